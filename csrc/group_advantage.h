// Group advantages; rmr1/kernels/group_advantage.py defines the op.
#pragma once

#include <cstdint>

namespace rmr1 {

// P groups; group p has the samples offsets[p] .. offsets[p + 1] - 1. Writes one advantage a sample
// or, with `token_offsets` [N + 1], one a token: sample i has tokens token_offsets[i] ...
void group_advantages(const float* rewards, const std::int64_t* offsets, std::int64_t groups,
                      bool divide_by_std, bool leave_one_out, const std::int64_t* token_offsets,
                      float* advantages, float eps);

}  // namespace rmr1
