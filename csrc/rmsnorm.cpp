#include "rmsnorm.h"

#include <cmath>

#define RMR1_THIS_FILE "rmsnorm.cpp"
#include "each_isa.h"
#include "simd.h"

namespace rmr1::RMR1_ISA {

// Calls work(i, count) for every vector of a row: `count` lanes of it are the row's.
template <class Work>
RMR1_INLINE void each_vector(std::int64_t width, const Work& work) {
    std::int64_t i = 0;
    for (; i + lanes <= width; i += lanes) work(i, lanes);
    if (i < width) work(i, static_cast<int>(width - i));
}

RMR1_INLINE vf take(const float* p, int count) {
    return count == lanes ? load(p) : load_some(p, count, 0);
}

RMR1_INLINE void put(float* p, vf x, int count) {
    if (count == lanes) {
        store(p, x);
    } else {
        store_some(p, x, count);
    }
}

static void rmsnorm(const NormRows& n, std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
        const float* x = n.x + row * n.width;
        vf squares = splat(0);
        if (n.added) {
            const float* added = n.added + row * n.width;
            float* sum = n.sum + row * n.width;
            each_vector(n.width, [&](std::int64_t i, int count) {
                const vf both = take(x + i, count) + take(added + i, count);
                put(sum + i, both, count);
                squares += both * both;
            });
            x = sum;
        } else {
            each_vector(n.width, [&](std::int64_t i, int count) {
                const vf one = take(x + i, count);
                squares += one * one;
            });
        }
        const float mean = sum_of(squares) / static_cast<float>(n.width);
        const float scale = 1.0f / std::sqrt(mean + n.eps);
        if (n.scale) n.scale[row] = scale;
        float* y = n.y + row * n.width;
        each_vector(n.width, [&](std::int64_t i, int count) {
            put(y + i, take(x + i, count) * scale * take(n.weight + i, count), count);
        });
    }
}

// dx = scale (g w - x_hat mean(g w x_hat)), x_hat = x scale; dw = sum over rows of g x_hat.
static void rmsnorm_backward(const NormSlopes& n, std::int64_t part) {
    float* on_weight = n.on_weight + part * n.width;
    each_vector(n.width, [&](std::int64_t i, int count) { put(on_weight + i, splat(0), count); });
    const std::int64_t begin = part * n.rows / n.parts, end = (part + 1) * n.rows / n.parts;
    for (std::int64_t row = begin; row < end; ++row) {
        const float *x = n.x + row * n.width, *on_y = n.on_y + row * n.width;
        const float* on_sum = n.on_sum ? n.on_sum + row * n.width : nullptr;
        float* on_x = n.on_x + row * n.width;
        const float scale = n.scale[row];
        vf dots = splat(0);
        each_vector(n.width, [&](std::int64_t i, int count) {
            const vf product = take(on_y + i, count) * take(x + i, count) * scale;
            put(on_weight + i, take(on_weight + i, count) + product, count);
            dots += product * take(n.weight + i, count);
        });
        const float mean = sum_of(dots) / static_cast<float>(n.width);
        each_vector(n.width, [&](std::int64_t i, int count) {
            const vf hat = take(x + i, count) * scale;
            vf slope = (take(on_y + i, count) * take(n.weight + i, count) - hat * mean) * scale;
            if (on_sum) slope += take(on_sum + i, count);
            put(on_x + i, slope, count);
        });
    }
}

}  // namespace rmr1::RMR1_ISA

#if RMR1_LAST_PASS
#include "parallel.h"

namespace rmr1 {

void rmsnorm(const NormRows& rows, int threads) {
    const auto run = RMR1_CHOOSE(rmsnorm);
    const std::int64_t grain = 65536 / (rows.width + 1) + 1;
    parallel_for(rows.rows, grain, threads,
                 [&](std::int64_t begin, std::int64_t end) { run(rows, begin, end); });
}

void rmsnorm_backward(const NormSlopes& slopes, int threads) {
    const auto run = RMR1_CHOOSE(rmsnorm_backward);
    parallel_for(slopes.parts, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t part = begin; part < end; ++part) run(slopes, part);
    });
}

}  // namespace rmr1
#endif
