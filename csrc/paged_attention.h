// Attention over a paged cache, for decoding and for chunks of prompts; rmr1/kernels/
// paged_attention.py defines the op.
#pragma once

#include <cstdint>

#include "kv_store.h"

namespace rmr1 {

// Rows begin .. end of queries that see the same `shared` first keys, whoever they belong to.
struct AttentionTask {
    std::int64_t begin, end, shared;
};

// Who attends to what, the same for all layers of a step; attention_plan.h makes it.
struct AttentionShape {
    const std::int32_t* tables;  // [S, table_width] block ids
    std::int64_t table_width;
    const std::int32_t* owner;  // [T] the sequence of a row of queries
    const std::int32_t* seen;   // [T] how many keys it sees; 0: padding, which gets zeros
    std::int64_t rows, heads;
    const AttentionTask* tasks;
    std::int64_t tasks_count, parts;  // `parts` of attention_part keys hold the longest context
};

constexpr std::int64_t attention_tile = 64;    // keys at a time
constexpr std::int64_t attention_part = 1024;  // keys of one task, and of one thread
constexpr std::int64_t attention_vectors = 64; // queries of a task: rows x heads of one group

// q, out [T, N, D], rows of q `q_stride` floats apart, out contiguous; scratch: attention_scratch
// floats. What a row gets does not depend, to the last bit, on other rows or on threads: keys are
// always taken in the same tiles and parts, and a tile is shared only as a whole.
void paged_attention(const AttentionShape& shape, const KvCache& cache, const float* q,
                     std::int64_t q_stride, float* out, float scale, float* scratch, int threads);

std::int64_t attention_scratch(const AttentionShape& shape, std::int64_t width);

}  // namespace rmr1
