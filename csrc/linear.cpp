#include "linear.h"

#define RMR1_THIS_FILE "linear.cpp"
#include "each_isa.h"
#include "simd.h"

// The usual way to multiply packs the weights and broadcasts x. Here it is the other way round: the
// lanes of a vector are rows of x, and each weight is broadcast once per tile of rows. Then x is
// what gets packed, which is small, and the weights are read in place, in order, as the trainer
// wrote them: no second copy, nothing to repack after an update.

namespace rmr1::RMR1_ISA {

constexpr std::int64_t tile = 2 * lanes;   // rows of x; a last tile of up to `lanes` rows is half
constexpr std::int64_t line = 16;          // floats of a cache line
constexpr std::int64_t strip = 48;         // outputs that one task makes
// Inputs that are summed at a time: a tile of them stays in L1, and a sum of sums rounds less.
constexpr std::int64_t depth = 192;
// Outputs of one inner loop: as many accumulators as registers hold.
constexpr int wide = RMR1_LANES == 16 ? 12 : 6, narrow = 2 * wide;

// Adds to c[r][v] the products of R rows of w with a tile of x that is V vectors wide; the `first`
// time c holds nothing.
template <int V, int R>
RMR1_INLINE void multiply(const float* x, const float* w, std::int64_t w_stride,
                          std::int64_t inputs, float* c, bool first) {
    vf sums[R][V] = {};
    for (std::int64_t k0 = 0; k0 < inputs; k0 += line) {
        // The weights come from memory: ask for the next rows while these are multiplied.
        for (int r = 0; r < R; ++r) __builtin_prefetch(w + (R + r) * w_stride + k0);
        const std::int64_t k1 = k0 + line < inputs ? k0 + line : inputs;
#pragma GCC unroll 2
        for (std::int64_t k = k0; k < k1; ++k) {
            vf columns[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) columns[v] = load(x + (k * V + v) * lanes);
#pragma GCC unroll 24
            for (int r = 0; r < R; ++r) {
                const vf weight = splat(w[r * w_stride + k]);
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) sums[r][v] += weight * columns[v];
            }
        }
    }
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            float* to = c + r * tile + v * lanes;
            store(to, first ? sums[r][v] : load(to) + sums[r][v]);
        }
    }
}

template <int V, int R>
static void multiply_strip(const float* x, const float* w, std::int64_t w_stride,
                           std::int64_t outputs, std::int64_t inputs, float* c, bool first) {
    std::int64_t n = 0;
    for (; n + R <= outputs; n += R) {
        multiply<V, R>(x, w + n * w_stride, w_stride, inputs, c + n * tile, first);
    }
    for (; n < outputs; ++n) {
        multiply<V, 1>(x, w + n * w_stride, w_stride, inputs, c + n * tile, first);
    }
}

// Rows m .. m + rows of y from sums that stand in columns.
RMR1_INLINE void store_rows(const Projection& p, const float* c, std::int64_t m, std::int64_t rows,
                            std::int64_t n0, std::int64_t outputs) {
    float* y = p.y + m * p.stride + n0;
    const float* bias = p.bias ? p.bias + n0 : nullptr;
    std::int64_t n = 0;
    for (; n + lanes <= outputs; n += lanes) {
        vf square[lanes];
        for (int i = 0; i < lanes; ++i) square[i] = load(c + (n + i) * tile);
        transpose(square);
        for (std::int64_t r = 0; r < rows; ++r) {
            vf sum = square[r];
            if (bias) sum += load(bias + n);
            float* to = y + r * p.stride + n;
            store(to, p.add ? load(to) + sum : sum);
        }
    }
    for (; n < outputs; ++n) {
        for (std::int64_t r = 0; r < rows; ++r) {
            const float sum = bias ? c[n * tile + r] + bias[n] : c[n * tile + r];
            float* to = y + r * p.stride + n;
            *to = p.add ? *to + sum : sum;
        }
    }
}

// Outputs n0 .. n0 + outputs of one projection, for up to `group` tiles of rows at a time.
static void linear_strip(const float* packed, std::int64_t rows, std::int64_t inputs,
                         const Projection& p, std::int64_t n0, std::int64_t outputs) {
    constexpr std::int64_t group = 16;
    alignas(64) float sums[group * strip * tile];
    for (std::int64_t m0 = 0; m0 < rows; m0 += group * tile) {
        const std::int64_t m1 = rows < m0 + group * tile ? rows : m0 + group * tile;
        // One tile is bound by memory: it takes a few rows of w to their end. With more tiles all rows
        // of the strip stay in the cache for the next tile.
        const std::int64_t step = m1 - m0 <= tile ? narrow : strip;
        for (std::int64_t n = 0; n < outputs; n += step) {
            const std::int64_t count = outputs - n < step ? outputs - n : step;
            for (std::int64_t k0 = 0; k0 < inputs; k0 += depth) {
                const std::int64_t some = inputs - k0 < depth ? inputs - k0 : depth;
                const float* w = p.w + (n0 + n) * inputs + k0;
                for (std::int64_t m = m0; m < m1; m += tile) {
                    const float* x = packed + m * inputs;
                    float* c = sums + (m - m0) * strip + n * tile;
                    if (rows - m > lanes) {
                        multiply_strip<2, wide>(x + k0 * tile, w, inputs, count, some, c, k0 == 0);
                    } else {
                        multiply_strip<1, narrow>(x + k0 * lanes, w, inputs, count, some, c, k0 == 0);
                    }
                }
            }
        }
        for (std::int64_t m = m0; m < m1; m += lanes) {
            const float* c = sums + (m - m0) / tile * tile * strip + (m - m0) % tile;
            store_rows(p, c, m, m1 - m < lanes ? m1 - m : lanes, n0, outputs);
        }
    }
}

// Columns begin..end of every tile.
static void pack_columns(const float* x, std::int64_t stride, std::int64_t rows,
                         std::int64_t inputs, float* packed, std::int64_t begin,
                         std::int64_t end) {
    for (std::int64_t m = 0; m < rows; m += tile) {
        const std::int64_t left = rows - m < tile ? rows - m : tile;
        const std::int64_t width = left > lanes ? tile : lanes;
        float* to = packed + m * inputs;
        for (std::int64_t first = 0; first < width; first += lanes) {
            std::int64_t k = begin;
            for (; k + lanes <= end; k += lanes) {
                vf square[lanes];
                for (int r = 0; r < lanes; ++r) {
                    const bool there = first + r < left;
                    square[r] = there ? load(x + (m + first + r) * stride + k) : vf{};
                }
                transpose(square);
                for (int i = 0; i < lanes; ++i) store(to + (k + i) * width + first, square[i]);
            }
            for (; k < end; ++k) {
                for (std::int64_t r = first; r < first + lanes; ++r) {
                    to[k * width + r] = r < left ? x[(m + r) * stride + k] : 0;
                }
            }
        }
    }
}

static std::int64_t strip_outputs() { return strip; }

}  // namespace rmr1::RMR1_ISA

#if RMR1_LAST_PASS
#include "parallel.h"

namespace rmr1 {

std::int64_t packed_floats(std::int64_t rows, std::int64_t inputs) {
    // For the widest vectors, whatever is in use now: a test may force another kind afterwards.
    constexpr std::int64_t widest = 32;
    return (rows + widest - 1) / widest * widest * inputs;
}

void pack_rows(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t inputs,
               float* packed, int threads) {
    const auto run = RMR1_CHOOSE(pack_columns);
    parallel_for(inputs, 32768 / (rows + 1) + 1, threads,
                 [&](std::int64_t begin, std::int64_t end) {
                     run(x, stride, rows, inputs, packed, begin, end);
                 });
}

void linear(const float* packed, std::int64_t rows, std::int64_t inputs,
            const Projection* projections, int count, int threads) {
    const auto run = RMR1_CHOOSE(linear_strip);
    const std::int64_t strip = RMR1_CHOOSE(strip_outputs)();
    std::int64_t tasks = 0;
    for (int p = 0; p < count; ++p) tasks += (projections[p].outputs + strip - 1) / strip;
    parallel_tasks(tasks, threads, [&](std::int64_t task) {
        const Projection* p = projections;
        std::int64_t first = task * strip;
        while (first >= (p->outputs + strip - 1) / strip * strip) {
            first -= (p->outputs + strip - 1) / strip * strip;
            ++p;
        }
        const std::int64_t left = p->outputs - first;
        run(packed, rows, inputs, *p, first, left < strip ? left : strip);
    });
}

}  // namespace rmr1
#endif
