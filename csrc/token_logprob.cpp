#include "token_logprob.h"

#include <cmath>

#define RMR1_THIS_FILE "token_logprob.cpp"
#include "each_isa.h"
#include "simd.h"

namespace rmr1::RMR1_ISA {

// Two passes over a tile's row, which is in the first-level cache after the first.
static void stats_of_row(const float* z, std::int64_t columns, bool with_dot, float* peak,
                         float* sum, float* dot) {
    const std::int64_t whole = columns / lanes * lanes;
    const int rest = static_cast<int>(columns - whole);
    const float lowest = -__builtin_inff();
    vf top = splat(lowest);
    for (std::int64_t i = 0; i < whole; i += lanes) top = vmax(load(z + i), top);
    if (rest) top = vmax(load_some(z + whole, rest, lowest), top);
    float m = max_of(top);
    if (!(m > *peak)) m = *peak;
    // Nothing but -inf so far: exp(z - m) would be NaN, and the sum stays 0.
    if (m == lowest) return;

    vf total = splat(0), weighted = splat(0);
    const vf shift = splat(m);
    if (with_dot) {
        for (std::int64_t i = 0; i < whole; i += lanes) {
            const vf x = load(z + i) - shift, e = exp(x);
            total += e;
            weighted += e * vmax(x, splat(-100.0f));  // 0 * -inf would be NaN
        }
    } else {
        vf second = splat(0);
        std::int64_t i = 0;
        for (; i + lanes < whole; i += 2 * lanes) {
            total += exp(load(z + i) - shift);
            second += exp(load(z + i + lanes) - shift);
        }
        if (i < whole) total += exp(load(z + i) - shift);
        total += second;
    }
    if (rest) {
        const vf x = load_some(z + whole, rest, lowest) - shift, e = exp(x);
        total += e;
        if (with_dot) weighted += e * vmax(x, splat(-100.0f));
    }
    const float fall = *peak - m;  // 0, or below
    const float scale = *peak == lowest ? 0.0f : std::exp(fall);
    if (with_dot) {
        const float before = scale == 0.0f ? 0.0f : scale * (*dot + *sum * fall);
        *dot = before + sum_of(weighted);
    }
    *sum = *sum * scale + sum_of(total);
    *peak = m;
}

static void stats_rows(const LogitTile& tile, const LogitStats& stats, std::int64_t begin,
                       std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
        const float* z = tile.z + row * tile.stride;
        stats_of_row(z, tile.columns, stats.dot != nullptr, stats.peak + row, stats.sum + row,
                     stats.dot ? stats.dot + row : nullptr);
        const std::int64_t at = tile.targets[row] - tile.first;
        if (at >= 0 && at < tile.columns) stats.target[row] = z[at];
    }
}

// d logp / d z = [target] - p;  d entropy / d z = -p (log p + entropy).
static void gradient_rows(const LogitTile& tile, const LogitGradient& given, std::int64_t begin,
                          std::int64_t end) {
    const std::int64_t whole = tile.columns / lanes * lanes;
    const int rest = static_cast<int>(tile.columns - whole);
    for (std::int64_t row = begin; row < end; ++row) {
        float* z = tile.z + row * tile.stride;
        const float on_logprob = given.on_logprob ? given.on_logprob[row] : 0.0f;
        const vf shift = splat(given.peak[row]), log_sum = splat(given.log_sum[row]);
        const vf minus = splat(-on_logprob);
        if (!given.on_entropy) {
            for (std::int64_t i = 0; i < whole; i += lanes) {
                store(z + i, minus * exp(load(z + i) - shift - log_sum));
            }
            if (rest) {
                const vf x = load_some(z + whole, rest, 0.0f);
                store_some(z + whole, minus * exp(x - shift - log_sum), rest);
            }
        } else {
            const vf weight = splat(-given.on_entropy[row]), entropy = splat(given.entropy[row]);
            for (std::int64_t i = 0; i < whole; i += lanes) {
                const vf x = vmax(load(z + i) - shift - log_sum, splat(-100.0f));
                store(z + i, exp(x) * (weight * (x + entropy) + minus));
            }
            if (rest) {
                const vf x = load_some(z + whole, rest, 0.0f) - shift - log_sum;
                const vf kept = vmax(x, splat(-100.0f));
                store_some(z + whole, exp(kept) * (weight * (kept + entropy) + minus), rest);
            }
        }
        const std::int64_t at = tile.targets[row] - tile.first;
        if (at >= 0 && at < tile.columns) z[at] += on_logprob;
    }
}

}  // namespace rmr1::RMR1_ISA

#if RMR1_LAST_PASS
#include "parallel.h"

namespace rmr1 {

// Rows for one thread: less than this is sooner done alone than shared out.
static std::int64_t grain(const LogitTile& tile) { return 65536 / (tile.columns + 1) + 1; }

void logit_stats(const LogitTile& tile, const LogitStats& stats, int threads) {
    const auto rows = RMR1_CHOOSE(stats_rows);
    parallel_for(tile.rows, grain(tile), threads, [&](std::int64_t begin, std::int64_t end) {
        rows(tile, stats, begin, end);
    });
}

void logit_gradient(const LogitTile& tile, const LogitGradient& gradient, int threads) {
    const auto rows = RMR1_CHOOSE(gradient_rows);
    parallel_for(tile.rows, grain(tile), threads, [&](std::int64_t begin, std::int64_t end) {
        rows(tile, gradient, begin, end);
    });
}

}  // namespace rmr1
#endif
