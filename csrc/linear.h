// y = x w^T for few or many rows, on weights as they lie; rmr1/kernels/linear.py defines the op.
#pragma once

#include <cstdint>

namespace rmr1 {

// x [M, K] laid out for `linear`: tiles of rows, in which the rows of one column stand together.
std::int64_t packed_floats(std::int64_t rows, std::int64_t inputs);
void pack_rows(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t inputs,
               float* packed, int threads);

// y [M, N] = x [M, K] w [N, K]^T + bias [N] (or null); w and bias contiguous, rows of y `stride`
// floats apart. With `add` it is added to what y holds.
struct Projection {
    const float *w, *bias;
    float* y;
    std::int64_t outputs, stride;
    bool add;
};

// Several projections of the same packed x. What a row gets does not depend, to the last bit, on
// the other rows, nor on the number of threads.
void linear(const float* packed, std::int64_t rows, std::int64_t inputs,
            const Projection* projections, int count, int threads);

}  // namespace rmr1
