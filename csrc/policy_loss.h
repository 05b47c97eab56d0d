// The policy loss of the GRPO family on packed tokens: loss, slope and statistics in one pass.
// rmr1/kernels/policy_loss.py defines the op; the fields are those of PolicyLossConfig.
#pragma once

#include <cstdint>

namespace rmr1 {

// T tokens of S sequences; sequence s has the tokens offsets[s] .. offsets[s + 1] - 1. `weights` [S]
// is what a token of the sequence counts in the sum. `ref` and `rollout` may be null.
struct PolicyTokens {
    const float *logprobs, *old, *ref, *rollout;
    const std::int64_t* offsets;
    const float *advantages, *weights;
    std::int64_t sequences;
};

struct PolicySettings {
    bool sequence_ratio, cispo;
    float low, high;     // bounds of the ratio
    float dual;          // 0: none
    float beta;
    int kl;              // 1, 2, 3
    int correction;      // 0 none, 1 truncate, 2 mask, 3 mask a sequence
    float correction_low, correction_high;
};

// Sums over tokens, unweighted; the order of STATS in rmr1/kernels/policy_loss.py.
struct PolicySums {
    double clipped_low, clipped_high, kl, ratio, ratio_max, ratio_min, mismatch, correction, bad;
};

// slope [T] = d loss / d logprobs. Returns the loss.
double policy_loss(const PolicyTokens& tokens, const PolicySettings& settings, float* slope,
                   PolicySums* sums);

}  // namespace rmr1
