#include "swiglu.h"

#define RMR1_THIS_FILE "swiglu.cpp"
#include "each_isa.h"
#include "simd.h"

namespace rmr1::RMR1_ISA {

static void swiglu(const float* gate, const float* up, float* out, std::int64_t begin,
                   std::int64_t end) {
    std::int64_t i = begin;
    for (; i + lanes <= end; i += lanes) {
        const vf g = load(gate + i);
        store(out + i, g * sigmoid(g) * load(up + i));
    }
    if (i == end) return;
    const int rest = static_cast<int>(end - i);
    const vf g = load_some(gate + i, rest, 0);
    store_some(out + i, g * sigmoid(g) * load_some(up + i, rest, 0), rest);
}

// d silu(g) / dg = s + g s (1 - s)
RMR1_INLINE void slopes(vf on_out, vf g, vf u, vf* on_gate, vf* on_up) {
    const vf s = sigmoid(g), silu = g * s;
    *on_up = on_out * silu;
    *on_gate = on_out * u * (s + silu * (1.0f - s));
}

static void swiglu_backward(const float* on_out, const float* gate, const float* up,
                            float* on_gate, float* on_up, std::int64_t begin, std::int64_t end) {
    std::int64_t i = begin;
    vf dg, du;
    for (; i + lanes <= end; i += lanes) {
        slopes(load(on_out + i), load(gate + i), load(up + i), &dg, &du);
        store(on_gate + i, dg);
        store(on_up + i, du);
    }
    if (i == end) return;
    const int rest = static_cast<int>(end - i);
    slopes(load_some(on_out + i, rest, 0), load_some(gate + i, rest, 0), load_some(up + i, rest, 0),
           &dg, &du);
    store_some(on_gate + i, dg, rest);
    store_some(on_up + i, du, rest);
}

}  // namespace rmr1::RMR1_ISA

#if RMR1_LAST_PASS
#include "parallel.h"

namespace rmr1 {

constexpr std::int64_t grain = 16384;  // an exp each: less is sooner done alone than shared out

void swiglu(const float* gate, const float* up, float* out, std::int64_t count, int threads) {
    const auto run = RMR1_CHOOSE(swiglu);
    parallel_for(count, grain, threads, [&](std::int64_t begin, std::int64_t end) {
        run(gate, up, out, begin, end);
    });
}

void swiglu_backward(const float* on_out, const float* gate, const float* up, float* on_gate,
                     float* on_up, std::int64_t count, int threads) {
    const auto run = RMR1_CHOOSE(swiglu_backward);
    parallel_for(count, grain, threads, [&](std::int64_t begin, std::int64_t end) {
        run(on_out, gate, up, on_gate, on_up, begin, end);
    });
}

}  // namespace rmr1
#endif
