// The CPU kernels for Python. Arrays come in through DLPack, so a torch tensor is taken as it lies;
// shapes have been checked by rmr1/kernels/*.py, which alone call these.
#include "bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <array>

#include "cpu.h"
#include "group_advantage.h"
#include "packed_attention.h"
#include "policy_loss.h"
#include "rmsnorm.h"
#include "rope.h"
#include "swiglu.h"
#include "token_logprob.h"

namespace nb = nanobind;

namespace {

template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// A matrix whose rows are contiguous, at any distance from each other.
template <class T>
using Rows = nb::ndarray<T, nb::ndim<2>, nb::device::cpu>;
template <class T>
using Maybe = std::optional<Vector<T>>;

// An argument that is taken as it lies or refused with a TypeError. By default nanobind would copy
// what has another dtype or order, and what is written to a copy is lost.
auto array(const char* name) { return nb::arg(name).noconvert(); }

// A gradient that is only read. Autograd may hand over one number for all rows, stretched to their
// count with a stride of 0; then a copy is what is wanted.
auto gradient(const char* name) { return nb::arg(name); }

template <class T>
T* data(const Maybe<T>& vector) {
    return vector ? vector->data() : nullptr;
}

template <class Array>
std::int64_t size(const Array& array, std::size_t axis) {
    return static_cast<std::int64_t>(array.shape(axis));
}

// DLPack does not tell the stride of an axis of one.
template <class Array>
bool lies(const Array& array, std::size_t axis, std::int64_t stride) {
    return array.size() == 0 || array.shape(axis) <= 1 || array.stride(axis) == stride;
}

rmr1::LogitTile tile_of(const Rows<float>& z, std::int64_t first,
                        const Vector<const std::int64_t>& targets) {
    if (!lies(z, 1, 1)) throw nb::type_error("z: its rows must be contiguous");
    return {z.data(), size(z, 0), size(z, 1), z.stride(0), first, targets.data()};
}

void logit_stats(const Rows<float>& z, std::int64_t first,
                 const Vector<const std::int64_t>& targets, const Vector<float>& peak,
                 const Vector<float>& sum, const Maybe<float>& dot, const Vector<float>& target,
                 int threads) {
    rmr1::logit_stats(tile_of(z, first, targets),
                      {peak.data(), sum.data(), data(dot), target.data()}, threads);
}

void logit_gradient(const Rows<float>& z, std::int64_t first,
                    const Vector<const std::int64_t>& targets, const Vector<const float>& peak,
                    const Vector<const float>& log_sum, const Maybe<const float>& entropy,
                    const Maybe<const float>& on_logprob, const Maybe<const float>& on_entropy,
                    int threads) {
    rmr1::logit_gradient(
        tile_of(z, first, targets),
        {peak.data(), log_sum.data(), data(entropy), data(on_logprob), data(on_entropy)}, threads);
}

// `settings`: the fields of PolicySettings in their order. Returns the loss and the sums.
nb::tuple policy_loss(const Vector<const float>& logprobs, const Vector<const float>& old,
                      const Maybe<const float>& ref, const Maybe<const float>& rollout,
                      const Vector<const std::int64_t>& offsets,
                      const Vector<const float>& advantages, const Vector<const float>& weights,
                      const std::array<float, 10>& settings, const Vector<float>& slope) {
    const auto& f = settings;
    const rmr1::PolicySettings set{f[0] != 0, f[1] != 0, f[2], f[3], f[4], f[5],
                                   static_cast<int>(f[6]), static_cast<int>(f[7]), f[8], f[9]};
    const rmr1::PolicyTokens tokens{logprobs.data(), old.data(), data(ref), data(rollout),
                                    offsets.data(), advantages.data(), weights.data(),
                                    static_cast<std::int64_t>(advantages.shape(0))};
    rmr1::PolicySums sums;
    double loss;
    {
        nb::gil_scoped_release unlocked;
        loss = rmr1::policy_loss(tokens, set, slope.data(), &sums);
    }
    return nb::make_tuple(loss, sums.clipped_low, sums.clipped_high, sums.kl, sums.ratio,
                          sums.ratio_max, sums.ratio_min, sums.mismatch, sums.correction, sums.bad);
}

void group_advantages(const Vector<const float>& rewards, const Vector<const std::int64_t>& offsets,
                      bool divide_by_std, bool leave_one_out,
                      const Maybe<const std::int64_t>& token_offsets, const Vector<float>& out,
                      float eps) {
    rmr1::group_advantages(rewards.data(), offsets.data(),
                           static_cast<std::int64_t>(offsets.shape(0)) - 1, divide_by_std,
                           leave_one_out, data(token_offsets), out.data(), eps);
}

using Matrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class Array>
auto* data_of(const std::optional<Array>& array) {
    return array ? array->data() : nullptr;
}

void swiglu(const ConstMatrix& gate, const ConstMatrix& up, const Matrix& out, int threads) {
    rmr1::swiglu(gate.data(), up.data(), out.data(), static_cast<std::int64_t>(out.size()), threads);
}

void swiglu_backward(const ConstMatrix& on_out, const ConstMatrix& gate, const ConstMatrix& up,
                     const Matrix& on_gate, const Matrix& on_up, int threads) {
    rmr1::swiglu_backward(on_out.data(), gate.data(), up.data(), on_gate.data(), on_up.data(),
                          static_cast<std::int64_t>(on_out.size()), threads);
}

void rmsnorm(const ConstMatrix& x, const std::optional<ConstMatrix>& added,
             const Vector<const float>& weight, const std::optional<Matrix>& sum, const Matrix& y,
             const Maybe<float>& scale, float eps, int threads) {
    rmr1::rmsnorm({x.data(), data_of(added), weight.data(), data_of(sum), y.data(), data(scale),
                   size(x, 0), size(x, 1), eps},
                  threads);
}

void rmsnorm_backward(const ConstMatrix& on_y, const std::optional<ConstMatrix>& on_sum,
                      const ConstMatrix& x, const Vector<const float>& weight,
                      const Vector<const float>& scale, const Matrix& on_x,
                      const Matrix& on_weight, int threads) {
    rmr1::rmsnorm_backward({on_y.data(), data_of(on_sum), x.data(), weight.data(), scale.data(),
                            on_x.data(), on_weight.data(), size(x, 0), size(x, 1),
                            size(on_weight, 0)},
                           threads);
}

void rope(const nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>& x, const ConstMatrix& cos,
          const ConstMatrix& sin,
          const nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>& y, bool back,
          int threads) {
    if (!lies(x, 2, 1) || !lies(x, 1, size(x, 2))) {
        throw nb::type_error("x: the heads of a token must be contiguous");
    }
    rmr1::rope({x.data(), cos.data(), sin.data(), y.data(), size(x, 0), size(x, 1), size(x, 2),
                x.stride(0), back},
               threads);
}

using Heads = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;
using OwnHeads = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

rmr1::PackedAttention attention_of(const Heads& q, const Heads& k, const Heads& v,
                                   const Table& segments, const Table& groups, float scale) {
    for (const Heads* x : {&q, &k, &v}) {
        if (!lies(*x, 2, 1) || !lies(*x, 1, size(*x, 2))) {
            throw nb::type_error("q, k, v: the heads of a token must be contiguous");
        }
    }
    if (size(segments, 1) != 4 || size(groups, 1) != 2 || size(q, 2) % 8 != 0 ||
        size(q, 2) > rmr1::packed_attention_widest) {
        throw nb::type_error("segments [S, 4], groups [G, 2], heads of a multiple of 8 up to 256");
    }
    static_assert(sizeof(rmr1::AttentionSegment) == 32 && sizeof(rmr1::AttentionGroup) == 16);
    return {reinterpret_cast<const rmr1::AttentionSegment*>(segments.data()),
            reinterpret_cast<const rmr1::AttentionGroup*>(groups.data()),
            size(groups, 0), size(q, 0), size(q, 1), size(k, 1), size(q, 2),
            q.data(), k.data(), v.data(), q.stride(0), k.stride(0), v.stride(0), scale};
}

void packed_attention(const Heads& q, const Heads& k, const Heads& v, const Table& segments,
                      const Table& groups, float scale, const OwnHeads& out, const Matrix& lse,
                      int threads) {
    rmr1::packed_attention(attention_of(q, k, v, segments, groups, scale), out.data(), lse.data(),
                           threads);
}

void packed_attention_backward(const OwnHeads& on_out, const Heads& q, const Heads& k,
                               const Heads& v, const OwnHeads& out, const Matrix& lse,
                               const Table& segments, const Table& groups, float scale,
                               const OwnHeads& on_q, const OwnHeads& on_k, const OwnHeads& on_v,
                               int threads) {
    rmr1::packed_attention_backward(attention_of(q, k, v, segments, groups, scale), on_out.data(),
                                    out.data(), lse.data(), on_q.data(), on_k.data(), on_v.data(),
                                    threads);
}

}  // namespace

void rmr1_bind_kernels(nb::module_& m) {
    m.def("isa", [] { return rmr1::name_of(rmr1::isa()); });
    m.def("force_isa", [](const std::string& name) { return rmr1::force_isa(name); }, nb::arg("name"));
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    m.def("logit_stats", &logit_stats, array("z"), nb::arg("first"), array("targets"),
          array("peak"), array("sum"), array("dot").none(), array("target"), nb::arg("threads"),
          unlocked);
    m.def("logit_gradient", &logit_gradient, array("z"), nb::arg("first"), array("targets"),
          array("peak"), array("log_sum"), array("entropy").none(), gradient("on_logprob").none(),
          gradient("on_entropy").none(), nb::arg("threads"), unlocked);
    m.def("group_advantages", &group_advantages, array("rewards"), array("offsets"),
          nb::arg("divide_by_std"), nb::arg("leave_one_out"), array("token_offsets").none(),
          array("out"), nb::arg("eps"), unlocked);
    m.def("policy_loss", &policy_loss, array("logprobs"), array("old"), array("ref").none(),
          array("rollout").none(), array("offsets"), array("advantages"), array("weights"),
          nb::arg("settings"), array("slope"));
    m.def("swiglu", &swiglu, array("gate"), array("up"), array("out"), nb::arg("threads"),
          unlocked);
    m.def("swiglu_backward", &swiglu_backward, array("on_out"), array("gate"), array("up"),
          array("on_gate"), array("on_up"), nb::arg("threads"), unlocked);
    m.def("rmsnorm", &rmsnorm, array("x"), array("added").none(), array("weight"),
          array("sum").none(), array("y"), array("scale").none(), nb::arg("eps"),
          nb::arg("threads"), unlocked);
    m.def("rmsnorm_backward", &rmsnorm_backward, array("on_y"), array("on_sum").none(), array("x"),
          array("weight"), array("scale"), array("on_x"), array("on_weight"), nb::arg("threads"),
          unlocked);
    m.def("rope", &rope, array("x"), array("cos"), array("sin"), array("y"), nb::arg("back"),
          nb::arg("threads"), unlocked);
    m.def("packed_attention", &packed_attention, array("q"), array("k"), array("v"),
          array("segments"), array("groups"), nb::arg("scale"), array("out"), array("lse"),
          nb::arg("threads"), unlocked);
    m.def("packed_attention_backward", &packed_attention_backward, array("on_out"), array("q"),
          array("k"), array("v"), array("out"), array("lse"), array("segments"), array("groups"),
          nb::arg("scale"), array("on_q"), array("on_k"), array("on_v"), nb::arg("threads"),
          unlocked);
}
