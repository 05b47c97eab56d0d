// What the generator needs on the CPU: products with few rows, the paged cache, and whole steps.
// Shapes have been checked in Python (rmr1/kernels, rmr1/engine/native_step.py).
#include "bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "checksum.h"
#include "decoder.h"
#include "linear.h"
#include "paged_attention.h"

namespace nb = nanobind;

namespace {

using Weights = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Heads = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;
using Cache = nb::ndarray<float, nb::ndim<4>, nb::device::cpu>;  // [blocks, block_size, K, D]
template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Table = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class Array>
std::int64_t size(const Array& array, std::size_t axis) {
    return static_cast<std::int64_t>(array.shape(axis));
}

// Taken as it lies or refused with a TypeError: what is written to a converted copy is lost.
auto array(const char* name) { return nb::arg(name).noconvert(); }

// DLPack does not tell the stride of an axis of one.
template <class Array>
bool lies(const Array& array, std::size_t axis, std::int64_t stride) {
    return array.size() == 0 || array.shape(axis) <= 1 || array.stride(axis) == stride;
}

void check_rows(const Rows& x, const char* message) {
    if (!lies(x, 1, 1)) throw nb::type_error(message);
}

void check_heads(const Heads& x, const char* message) {
    if (!lies(x, 2, 1) || !lies(x, 1, size(x, 2))) throw nb::type_error(message);
}

// The cache whose axes begin at `first`: a layer's, or the first layer's of several.
template <class Array>
rmr1::KvCache cache_of(const Array& keys, const Array& values, std::size_t first = 0) {
    const std::int64_t block_size = size(keys, first + 1), heads = size(keys, first + 2);
    const std::int64_t width = size(keys, first + 3), lanes = keys.stride(first + 3);
    if (lanes % 16 != 0 || lanes < block_size || !lies(keys, first, heads * width * lanes) ||
        !lies(keys, first + 1, 1) || !lies(keys, first + 2, width * lanes)) {
        throw nb::type_error("the keys do not lie as new_cache makes them");
    }
    if (!lies(values, first, heads * block_size * width) || !lies(values, first + 1, width) ||
        !lies(values, first + 2, block_size * width) || !lies(values, first + 3, 1)) {
        throw nb::type_error("the values do not lie as new_cache makes them");
    }
    return {keys.data(), values.data(), heads, width, block_size, lanes};
}

rmr1::Sequences sequences_of(const Table<std::int32_t>& tables,
                             const Vector<std::int32_t>& contexts,
                             const Vector<std::int32_t>& starts, std::int64_t block_size) {
    return {tables.data(), contexts.data(), starts.data(), size(contexts, 0), size(tables, 1),
            block_size};
}

void linear(const Rows& x, const Table<float>& weight, const std::optional<Vector<float>>& bias,
            const Matrix& out, int threads) {
    check_rows(x, "x: its rows must be contiguous");
    const std::int64_t rows = size(x, 0), inputs = size(x, 1);
    std::vector<float> packed(rmr1::packed_floats(rows, inputs));
    rmr1::pack_rows(x.data(), x.stride(0), rows, inputs, packed.data(), threads);
    const rmr1::Projection one{weight.data(), bias ? bias->data() : nullptr, out.data(),
                               size(weight, 0), size(out, 1), false};
    rmr1::linear(packed.data(), rows, inputs, &one, 1, threads);
}

void kv_store(const Heads& key, const Heads& value, const Cache& key_cache, const Cache& value_cache,
              const Vector<std::int64_t>& slots, int threads) {
    check_heads(key, "key: the heads of a token must be contiguous");
    check_heads(value, "value: the heads of a token must be contiguous");
    rmr1::kv_store(cache_of(key_cache, value_cache), key.data(), key.stride(0), value.data(),
                   value.stride(0), slots.data(), size(slots, 0), threads);
}

void paged_attention(const Heads& q, const Cache& key_cache, const Cache& value_cache,
                     const Table<std::int32_t>& tables, const Vector<std::int32_t>& contexts,
                     const Vector<std::int32_t>& starts,
                     const nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>& out,
                     float scale, int threads) {
    check_heads(q, "q: the heads of a token must be contiguous");
    const rmr1::KvCache cache = cache_of(key_cache, value_cache);
    rmr1::AttentionPlan plan;
    plan.make(sequences_of(tables, contexts, starts, cache.block_size), size(q, 1), cache.heads,
              threads);
    std::vector<float> scratch(rmr1::attention_scratch(plan.shape(), cache.width));
    rmr1::paged_attention(plan.shape(), cache, q.data(), q.stride(0), out.data(), scale,
                          scratch.data(), threads);
}

// A decoder with the arrays that its pointers point into.
struct NativeDecoder {
    std::vector<std::optional<Weights>> weights;
    std::unique_ptr<rmr1::Decoder> decoder;
};

constexpr std::size_t per_layer = sizeof(rmr1::DecoderLayer) / sizeof(const float*);

// `weights`: embedding, final norm, then each layer's in the order of DecoderLayer, None for what
// the model lacks. `sizes`: those of DecoderSizes, in order.
void make_decoder(NativeDecoder* self, const std::vector<std::int64_t>& sizes, float eps,
                  std::vector<std::optional<Weights>> weights) {
    if (sizes.size() != 7 || weights.size() != 2 + per_layer * sizes[3]) {
        throw std::invalid_argument("Decoder: 7 sizes, and 2 + 18 weights a layer are needed");
    }
    const auto at = [&](std::size_t i) { return weights[i] ? weights[i]->data() : nullptr; };
    std::vector<rmr1::DecoderLayer> layers;
    for (std::int64_t layer = 0; layer < sizes[3]; ++layer) {
        const float* p[per_layer];
        for (std::size_t i = 0; i < per_layer; ++i) p[i] = at(2 + layer * per_layer + i);
        layers.push_back({p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11],
                          p[12], p[13], p[14], p[15], p[16], p[17]});
    }
    const rmr1::DecoderSizes numbers{sizes[0], sizes[1], sizes[2], sizes[3],
                                     sizes[4], sizes[5], sizes[6], eps};
    auto decoder = std::make_unique<rmr1::Decoder>(numbers, std::move(layers), at(0), at(1));
    new (self) NativeDecoder{std::move(weights), std::move(decoder)};
}

void run_decoder(NativeDecoder& self, const Vector<std::int64_t>& tokens,
                 const Vector<std::int32_t>& positions, const Vector<std::int64_t>& slots,
                 const Table<std::int32_t>& tables, const Vector<std::int32_t>& contexts,
                 const Vector<std::int32_t>& starts, const Table<float>& cos,
                 const Table<float>& sin,
                 const nb::ndarray<float, nb::ndim<5>, nb::device::cpu>& keys,
                 const nb::ndarray<float, nb::ndim<5>, nb::device::cpu>& values,
                 const Vector<std::int32_t>& wanted, const Matrix& hidden, int threads) {
    std::vector<rmr1::KvCache> caches;
    for (std::int64_t layer = 0; layer < size(keys, 0); ++layer) {
        caches.push_back(cache_of(keys, values, 1));
        caches.back().keys += layer * keys.stride(0);
        caches.back().values += layer * values.stride(0);
    }
    const rmr1::DecoderStep step{tokens.data(),
                                 slots.data(),
                                 positions.data(),
                                 size(tokens, 0),
                                 sequences_of(tables, contexts, starts, size(keys, 2)),
                                 cos.data(),
                                 sin.data(),
                                 wanted.data(),
                                 size(wanted, 0),
                                 hidden.data()};
    self.decoder->run(step, caches.data(), threads);
}

}  // namespace

void rmr1_bind_generation(nb::module_& m) {
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    m.def("linear", &linear, array("x"), array("weight"), array("bias").none(), array("out"),
          nb::arg("threads"), unlocked);
    m.def("kv_store", &kv_store, array("key"), array("value"), array("key_cache"),
          array("value_cache"), array("slots"), nb::arg("threads"), unlocked);
    m.def("paged_attention", &paged_attention, array("q"), array("key_cache"), array("value_cache"),
          array("block_tables"), array("context_lengths"), array("query_starts"), array("out"),
          nb::arg("scale"), nb::arg("threads"), unlocked);
    m.def(
        "checksum",
        [](const nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& bytes,
           int threads) { return rmr1::checksum(bytes.data(), size(bytes, 0), threads); },
        array("bytes"), nb::arg("threads"), unlocked);
    nb::class_<NativeDecoder>(m, "Decoder")
        .def("__init__", &make_decoder, nb::arg("sizes"), nb::arg("eps"), array("weights"))
        .def("run", &run_decoder, array("tokens"), array("positions"), array("slots"),
             array("block_tables"), array("context_lengths"), array("query_starts"), array("cos"),
             array("sin"), array("keys"), array("values"), array("wanted"), array("hidden"),
             nb::arg("threads"), unlocked)
        .def("seconds", [](const NativeDecoder& self) {
            const auto& s = self.decoder->seconds();
            return std::vector<double>(s.begin(), s.end());
        });
}
