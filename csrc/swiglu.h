// SwiGLU forward and backward; rmr1/kernels/swiglu.py defines the op. Arrays of `count` floats.
#pragma once

#include <cstdint>

namespace rmr1 {

void swiglu(const float* gate, const float* up, float* out, std::int64_t count, int threads);

void swiglu_backward(const float* on_out, const float* gate, const float* up, float* on_gate,
                     float* on_up, std::int64_t count, int threads);

}  // namespace rmr1
