// Rotary position embedding; rmr1/kernels/rope.py defines the op.
#pragma once

#include <cstdint>

namespace rmr1 {

// x [T, N, D] has tokens `token_stride` floats apart and heads next to each other; y [T, N, D] is
// contiguous and may be x; cos and sin [T, D / 2]. `back` turns the other way, as the gradient does.
struct Turn {
    const float *x, *cos, *sin;
    float* y;
    std::int64_t tokens, heads, width, token_stride;
    bool back;
};

void rope(const Turn& turn, int threads);

}  // namespace rmr1
