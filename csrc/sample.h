// One token a row by the Gumbel trick, with filters; rmr1/kernels/sample.py defines it.
#pragma once

#include <cstdint>

namespace rmr1 {

// logits [B, V], the rows `stride` apart; everything else [B]. `keys` seed the rows' noise. A row
// that cannot be drawn from (NaN, +inf, nothing finite) gets token -1 and NaN.
struct SampleRows {
    const float* logits;
    std::int64_t rows, width, stride;
    const std::int64_t* keys;
    const float* temperature;    // 0: greedy
    const std::int32_t* top_k;   // 0: off
    const float *top_p, *min_p;  // off: 1 and 0
    std::int64_t* tokens;
    float *logprobs, *sampled_logprobs;
};

void sample(const SampleRows& rows, int threads);

}  // namespace rmr1
