// RMSNorm forward and backward, alone and after a residual sum; rmr1/kernels/rmsnorm.py defines it.
#pragma once

#include <cstdint>

namespace rmr1 {

// x, y [R, H]; weight [H]; scale [R] receives 1 / root-mean-square for the backward, or is null.
// With `added` [R, H] the row is x + added, which is written to `sum` [R, H].
struct NormRows {
    const float *x, *added, *weight;
    float *sum, *y, *scale;
    std::int64_t rows, width;
    float eps;
};

void rmsnorm(const NormRows& rows, int threads);

// on_x [R, H] from on_y; `on_sum` [R, H], what else depends on the row, is added, or null. on_weight
// [parts, H] receives one partial sum a part: parts, and so the sums, do not depend on threads.
struct NormSlopes {
    const float *on_y, *on_sum, *x, *weight, *scale;
    float *on_x, *on_weight;
    std::int64_t rows, width, parts;
};

void rmsnorm_backward(const NormSlopes& slopes, int threads);

}  // namespace rmr1
