// The element-wise half of the fused log-probability: what happens to a tile of logits between the
// GEMM that makes it and the GEMMs that use it. rmr1/kernels/token_logprob.py defines the op.
//
// z [rows, columns] is a tile of the logits [T, V] that begins at word `first`; its rows lie
// `stride` floats apart. Vectors have one entry a row.
#pragma once

#include <cstdint>

namespace rmr1 {

struct LogitTile {
    float* z;
    std::int64_t rows, columns, stride, first;
    const std::int64_t* targets;
};

// Running statistics over the tiles of a row: with m = max z, `sum` = sum exp(z - m) and `dot` =
// sum exp(z - m) (z - m); `target` is z at the row's target once its tile has passed. Before the
// first tile peak is -inf and sum and dot are 0. `dot` may be null when no entropy is wanted.
struct LogitStats {
    float *peak, *sum, *dot, *target;
};

void logit_stats(const LogitTile& tile, const LogitStats& stats, int threads);

// What the gradient of a row's logits depends on. `log_sum` = log sum exp(z - peak). A null
// `on_entropy` means that the loss does not depend on the entropy; else `entropy` is needed too.
struct LogitGradient {
    const float *peak, *log_sum, *entropy, *on_logprob, *on_entropy;
};

// Overwrites the tile with d loss / d z.
void logit_gradient(const LogitTile& tile, const LogitGradient& gradient, int threads);

}  // namespace rmr1
