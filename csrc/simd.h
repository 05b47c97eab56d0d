// Vectors of floats for the kernels, in GCC's vector extension: the same source for every
// instruction set. Included once per instruction set (see each_isa.h), so without a guard.

namespace rmr1::RMR1_ISA {

constexpr int lanes = RMR1_LANES;
typedef float vf __attribute__((vector_size(4 * RMR1_LANES)));
typedef int vi __attribute__((vector_size(4 * RMR1_LANES)));
// As they lie in memory: at any address, and whatever else is there.
typedef float vf_unaligned __attribute__((vector_size(4 * RMR1_LANES), aligned(4), may_alias));

#define RMR1_INLINE static inline __attribute__((always_inline))

RMR1_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
RMR1_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }
RMR1_INLINE vf splat(float x) { return x - vf{}; }

// The first `count` lanes from memory, the others `fill`.
RMR1_INLINE vf load_some(const float* p, int count, float fill) {
    float some[lanes];
    for (int i = 0; i < lanes; ++i) some[i] = i < count ? p[i] : fill;
    return load(some);
}
RMR1_INLINE void store_some(float* p, vf x, int count) {
    for (int i = 0; i < count; ++i) p[i] = x[i];
}

// x within [low, high]; NaN stays NaN.
RMR1_INLINE vf bounded(vf x, float low, float high) {
    const vf raised = x < low ? splat(low) : x;
    return raised > high ? splat(high) : raised;
}

// Where `a` is NaN, `b`: a maximum over values that may hold NaN keeps the others.
RMR1_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

RMR1_INLINE float sum_of(vf x) {
    float total = 0;
    for (int i = 0; i < lanes; ++i) total += x[i];
    return total;
}
RMR1_INLINE float max_of(vf x) {
    float top = x[0];
    for (int i = 1; i < lanes; ++i) top = x[i] > top ? x[i] : top;
    return top;
}

// Exchanges rows and columns of a square: x[i][j] and x[j][i]. Each round swaps the off-diagonal
// halves of squares twice as large, within pairs of vectors.
template <int distance = 1>
RMR1_INLINE void transpose(vf (&x)[lanes]) {
    if constexpr (distance < lanes) {
        vi first, second;
        for (int i = 0; i < lanes; ++i) {
            first[i] = i & distance ? lanes + i - distance : i;
            second[i] = i & distance ? lanes + i : i + distance;
        }
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
            if (i & distance) continue;
            const vf a = x[i], b = x[i + distance];
            x[i] = __builtin_shuffle(a, b, first);
            x[i + distance] = __builtin_shuffle(a, b, second);
        }
        transpose<2 * distance>(x);
    }
}

// exp(x), 2 ulp, for x up to 88; below -87.3 it is 0, NaN stays NaN. Cody-Waite reduction to
// [-ln 2 / 2, ln 2 / 2] and a polynomial of degree 6 (minimax coefficients as in Cephes).
RMR1_INLINE vf exp(vf x) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf scaled = x * 1.44269504088896341f + magic;
    const vf n = scaled - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const vi power = ((vi)scaled - (vi)magic + 127) << 23;
    const vf result = y * (vf)power;
    return x < -87.3f ? vf{} : result;
}

// 1 / (1 + exp(-x)), and 0 below -87; NaN stays NaN.
RMR1_INLINE vf sigmoid(vf x) {
    const vf s = 1.0f / (1.0f + exp(-bounded(x, -87.0f, 87.0f)));
    return x < -87.0f ? vf{} : s;
}

}  // namespace rmr1::RMR1_ISA
