// Attention of training: packed sequences in groups that share a prompt, forward and backward, fp32;
// rmr1/kernels/packed_attention.py defines the op.
#pragma once

#include <cstdint>

namespace rmr1 {

// A run of queries. Each sees all keys of the prefix, then those of its own run up to itself.
struct AttentionSegment {
    std::int64_t begin, end, prefix_begin, prefix_end;
};

// Segments first .. last of one group; its keys are the tokens from the first one's begin to the
// last one's end.
struct AttentionGroup {
    std::int64_t first, last;
};

// Rows first .. first + rows of a segment: its queries, each with the `group` heads that share key head
// `head`; row = query x group + g.
struct AttentionRows {
    const AttentionSegment* segment;
    std::int64_t head, group, first, rows;
};

// Tokens are q_stride (kv_stride) floats apart, heads `width` floats, which is a multiple of 8.
struct PackedAttention {
    const AttentionSegment* segments;
    const AttentionGroup* groups;
    std::int64_t groups_count, tokens, heads, kv_heads, width;
    const float *q, *k, *v;
    std::int64_t q_stride, k_stride, v_stride;
    float scale;
};

constexpr std::int64_t packed_attention_widest = 256;

// out [T, N, D] and lse [T, N], contiguous.
void packed_attention(const PackedAttention& a, float* out, float* lse, int threads);

// on_out, out [T, N, D] and lse -> on_q [T, N, D], on_k and on_v [T, K, D], all contiguous. Sums run
// in an order that does not depend on threads.
void packed_attention_backward(const PackedAttention& a, const float* on_out, const float* out,
                               const float* lse, float* on_q, float* on_k, float* on_v,
                               int threads);

}  // namespace rmr1
