#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "linear.h"
#include "paged_attention.h"
#include "rmsnorm.h"
#include "rope.h"
#include "swiglu.h"

namespace rmr1 {
namespace {

// The MLP's buffers are the largest: it takes so many tokens at a time.
constexpr std::int64_t mlp_rows = 512;

double now() {
    using clock = std::chrono::steady_clock;
    return std::chrono::duration<double>(clock::now().time_since_epoch()).count();
}

void normalise(const float* x, const float* weight, float* y, std::int64_t rows, std::int64_t width,
               float eps, int threads) {
    rmsnorm({x, nullptr, weight, nullptr, y, nullptr, rows, width, eps}, threads);
}

void copy_rows(const float* from, float* to, std::int64_t width) { std::copy_n(from, width, to); }

}  // namespace

void Decoder::run(const DecoderStep& step, const KvCache* caches, int threads) {
    const std::int64_t hidden = sizes_.hidden, half = sizes_.width / 2;
    clock_ = now();
    grow(step.count);
    plan_.make(step.sequences, sizes_.heads, sizes_.kv_heads, threads);
    const auto needed = static_cast<std::size_t>(attention_scratch(plan_.shape(), sizes_.width));
    if (scratch_.size() < needed) scratch_.resize(needed);
    for (std::int64_t t = 0; t < step.count; ++t) {
        copy_rows(embedding_ + step.tokens[t] * hidden, x_.data() + t * hidden, hidden);
        copy_rows(step.cos + step.positions[t] * half, cos_.data() + t * half, half);
        copy_rows(step.sin + step.positions[t] * half, sin_.data() + t * half, half);
    }
    count(norm);
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
        attend(layers_[layer], caches[layer], step, threads);
        feed_forward(layers_[layer], step.count, threads);
    }
    for (std::int64_t r = 0; r < step.wanted_count; ++r) {
        copy_rows(x_.data() + step.wanted[r] * hidden, step.hidden + r * hidden, hidden);
    }
    normalise(step.hidden, final_norm_, step.hidden, step.wanted_count, hidden, sizes_.eps, threads);
    count(norm);
}

// x += o_proj(attention(norm(x)))
void Decoder::attend(const DecoderLayer& layer, const KvCache& cache, const DecoderStep& step,
                     int threads) {
    const auto& s = sizes_;
    const std::int64_t rows = step.count, queries = s.heads * s.width, keys = s.kv_heads * s.width;
    normalise(x_.data(), layer.input_norm, normed_.data(), rows, s.hidden, s.eps, threads);
    count(norm);
    pack_rows(normed_.data(), s.hidden, rows, s.hidden, packed_.data(), threads);
    const Projection in[] = {{layer.q, layer.q_bias, q_.data(), queries, queries, false},
                             {layer.k, layer.k_bias, k_.data(), keys, keys, false},
                             {layer.v, layer.v_bias, v_.data(), keys, keys, false}};
    linear(packed_.data(), rows, s.hidden, in, 3, threads);
    count(projections);
    if (layer.q_norm) {
        normalise(q_.data(), layer.q_norm, q_.data(), rows * s.heads, s.width, s.eps, threads);
        normalise(k_.data(), layer.k_norm, k_.data(), rows * s.kv_heads, s.width, s.eps, threads);
    }
    rope({q_.data(), cos_.data(), sin_.data(), q_.data(), rows, s.heads, s.width, queries, false},
         threads);
    rope({k_.data(), cos_.data(), sin_.data(), k_.data(), rows, s.kv_heads, s.width, keys, false},
         threads);
    kv_store(cache, k_.data(), keys, v_.data(), keys, step.slots, rows, threads);
    const float scale = 1.0f / std::sqrt(static_cast<float>(s.width));
    paged_attention(plan_.shape(), cache, q_.data(), queries, mixed_.data(), scale, scratch_.data(),
                    threads);
    count(attention);
    pack_rows(mixed_.data(), queries, rows, queries, packed_.data(), threads);
    const Projection out{layer.o, layer.o_bias, x_.data(), s.hidden, s.hidden, true};
    linear(packed_.data(), rows, queries, &out, 1, threads);
    count(projections);
}

// x += down_proj(silu(gate_proj(norm(x))) * up_proj(norm(x)))
void Decoder::feed_forward(const DecoderLayer& layer, std::int64_t rows, int threads) {
    const auto& s = sizes_;
    normalise(x_.data(), layer.post_norm, normed_.data(), rows, s.hidden, s.eps, threads);
    count(norm);
    for (std::int64_t first = 0; first < rows; first += mlp_rows) {
        const std::int64_t some = std::min(mlp_rows, rows - first);
        pack_rows(normed_.data() + first * s.hidden, s.hidden, some, s.hidden, packed_.data(),
                  threads);
        const Projection in[] = {{layer.gate, layer.gate_bias, gate_.data(), s.inner, s.inner, false},
                                 {layer.up, layer.up_bias, up_.data(), s.inner, s.inner, false}};
        linear(packed_.data(), some, s.hidden, in, 2, threads);
        swiglu(gate_.data(), up_.data(), gate_.data(), some * s.inner, threads);
        pack_rows(gate_.data(), s.inner, some, s.inner, packed_.data(), threads);
        const Projection out{layer.down,         layer.down_bias, x_.data() + first * s.hidden,
                             s.hidden, s.hidden, true};
        linear(packed_.data(), some, s.inner, &out, 1, threads);
    }
    count(mlp);
}

void Decoder::grow(std::int64_t rows) {
    if (rows <= rows_) return;
    const auto& s = sizes_;
    const std::int64_t some = std::min(rows, mlp_rows);
    x_.resize(rows * s.hidden);
    normed_.resize(rows * s.hidden);
    q_.resize(rows * s.heads * s.width);
    k_.resize(rows * s.kv_heads * s.width);
    v_.resize(rows * s.kv_heads * s.width);
    mixed_.resize(rows * s.heads * s.width);
    cos_.resize(rows * s.width / 2);
    sin_.resize(rows * s.width / 2);
    gate_.resize(some * s.inner);
    up_.resize(some * s.inner);
    packed_.resize(std::max({packed_floats(rows, std::max(s.hidden, s.heads * s.width)),
                             packed_floats(some, s.inner)}));
    rows_ = rows;  // last: an allocation may have failed
}

void Decoder::count(Phase phase) {
    const double time = now();
    seconds_[phase] += time - clock_;
    clock_ = time;
}

}  // namespace rmr1
