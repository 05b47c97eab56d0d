#include "rope.h"

#define RMR1_THIS_FILE "rope.cpp"
#include "each_isa.h"
#include "simd.h"

namespace rmr1::RMR1_ISA {

// The halves of a head are the real and imaginary parts of width / 2 numbers.
static void rope(const Turn& t, std::int64_t begin, std::int64_t end) {
    const std::int64_t half = t.width / 2;
    const float direction = t.back ? -1.0f : 1.0f;
    for (std::int64_t token = begin; token < end; ++token) {
        const float *cos = t.cos + token * half, *sin = t.sin + token * half;
        for (std::int64_t head = 0; head < t.heads; ++head) {
            const float* x = t.x + token * t.token_stride + head * t.width;
            float* y = t.y + (token * t.heads + head) * t.width;
            std::int64_t i = 0;
            for (; i + lanes <= half; i += lanes) {
                const vf c = load(cos + i), s = load(sin + i) * direction;
                const vf a = load(x + i), b = load(x + half + i);
                store(y + i, a * c - b * s);
                store(y + half + i, b * c + a * s);
            }
            for (; i < half; ++i) {
                const float s = sin[i] * direction, a = x[i], b = x[half + i];
                y[i] = a * cos[i] - b * s;
                y[half + i] = b * cos[i] + a * s;
            }
        }
    }
}

}  // namespace rmr1::RMR1_ISA

#if RMR1_LAST_PASS
#include "parallel.h"

namespace rmr1 {

void rope(const Turn& turn, int threads) {
    const auto run = RMR1_CHOOSE(rope);
    const std::int64_t grain = 65536 / (turn.heads * turn.width + 1) + 1;
    parallel_for(turn.tokens, grain, threads,
                 [&](std::int64_t begin, std::int64_t end) { run(turn, begin, end); });
}

}  // namespace rmr1
#endif
