// One step of generation on the CPU: every layer of a decoder for a batch of new tokens, over a paged
// cache. The same computation as rmr1/engine/model.py, without a Python call per op.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "attention_plan.h"
#include "kv_store.h"

namespace rmr1 {

struct DecoderSizes {
    std::int64_t vocabulary, hidden, inner, layers, heads, kv_heads, width;
    float eps;
};

// Weights of a layer, contiguous as torch has them: [outputs, inputs]. What a model lacks is null.
struct DecoderLayer {
    const float *input_norm, *q, *q_bias, *k, *k_bias, *v, *v_bias, *q_norm, *k_norm, *o, *o_bias,
        *post_norm, *gate, *gate_bias, *up, *up_bias, *down, *down_bias;
};

// The new tokens of a step.
struct DecoderStep {
    const std::int64_t *tokens, *slots;  // [T] ids, and where their keys go (see kv_store.h)
    const std::int32_t* positions;       // [T]
    std::int64_t count;                  // T
    Sequences sequences;
    const float *cos, *sin;              // [positions, D / 2], a row for every position in use
    const std::int32_t* wanted;          // [R] rows whose hidden state is wanted
    std::int64_t wanted_count;
    float* hidden;                       // [R, H], after the final norm
};

class Decoder {
public:
    enum Phase { norm, projections, attention, mlp, phases };

    Decoder(const DecoderSizes& sizes, std::vector<DecoderLayer> layers, const float* embedding,
            const float* final_norm)
        : sizes_(sizes), layers_(std::move(layers)), embedding_(embedding), final_norm_(final_norm) {}

    // `caches`: one a layer.
    void run(const DecoderStep& step, const KvCache* caches, int threads);

    // Seconds spent since the start, by phase.
    const std::array<double, phases>& seconds() const { return seconds_; }

private:
    void attend(const DecoderLayer& layer, const KvCache& cache, const DecoderStep& step,
                int threads);
    void feed_forward(const DecoderLayer& layer, std::int64_t rows, int threads);
    void grow(std::int64_t rows);
    void count(Phase phase);

    DecoderSizes sizes_;
    std::vector<DecoderLayer> layers_;
    const float *embedding_, *final_norm_;
    AttentionPlan plan_;
    // Buffers for `rows_` tokens, kept from step to step. They grow as vectors do: ever more rows mean
    // few moves.
    std::int64_t rows_ = 0;
    std::vector<float> x_, normed_, packed_, q_, k_, v_, mixed_, gate_, up_, cos_, sin_, scratch_;
    std::array<double, phases> seconds_{};
    double clock_ = 0;
};

}  // namespace rmr1
