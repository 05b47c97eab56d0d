// Gumbel noise by key and token, in vectors; rmr1/kernels/sample.py defines it. Included after simd.h
// and simd_log.h, once per instruction set, so without a guard.

namespace rmr1::RMR1_ISA {

typedef unsigned vu __attribute__((vector_size(4 * RMR1_LANES)));  // `>>` brings in zeros

// No noise is larger: 32 ln 2 = 22.1807.
constexpr float noise_limit = 22.181f;

struct Key {
    unsigned low, high;
};

// The finaliser of SplitMix64, so that keys that count up share nothing.
RMR1_INLINE Key key_of(std::int64_t key) {
    std::uint64_t x = static_cast<std::uint64_t>(key) + 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    return {static_cast<unsigned>(x), static_cast<unsigned>(x >> 32)};
}

// 31 random bits for every token of a vector: "triple32" of Chris Wellons, "Prospecting for Hash
// Functions" (nullprogram.com, 2018), with half of the key before each of its first two rounds.
RMR1_INLINE vi bits_of(Key key, std::int64_t first) {
    vu x;
    for (int i = 0; i < lanes; ++i) x[i] = static_cast<unsigned>(i);
    x = (x + static_cast<unsigned>(first)) ^ key.low;
    x = (x ^ (x >> 17)) * 0xed5ad4bbu ^ key.high;
    x = (x ^ (x >> 11)) * 0xac4c1b51u;
    x = (x ^ (x >> 15)) * 0x31848babu;
    return (vi)((x ^ (x >> 14)) >> 1);
}

// -log(-log(1 - w)). The exponential is exact for small w, which is where the winners are: what
// 1 - w rounds away is added again.
RMR1_INLINE vf noise_of(vi bits) {
    vf w = (__builtin_convertvector(bits, vf) + 0.5f) * 0x1p-31f;
    w = w > 1.0f - 0x1p-24f ? splat(1.0f - 0x1p-24f) : w;
    const vf rest = 1.0f - w;
    return -log((w - (1.0f - rest)) - log(rest));
}

}  // namespace rmr1::RMR1_ISA
