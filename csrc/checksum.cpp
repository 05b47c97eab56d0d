#include "checksum.h"

#define RMR1_THIS_FILE "checksum.cpp"
#include "each_isa.h"
#include "simd.h"

namespace rmr1::RMR1_ISA {

typedef std::uint32_t vu __attribute__((vector_size(4 * RMR1_LANES)));
typedef std::uint32_t vu_unaligned
    __attribute__((vector_size(4 * RMR1_LANES), aligned(1), may_alias));

// Two sums modulo 2^32 of words times odd numbers, another one for each place.
static std::uint64_t checksum(const unsigned char* bytes, std::int64_t begin, std::int64_t end) {
    vu place, low{}, high{};
    for (int i = 0; i < lanes; ++i) place[i] = static_cast<std::uint32_t>(begin) + i;
    std::int64_t word = begin;
    for (; word + lanes <= end; word += lanes) {
        const vu x = *reinterpret_cast<const vu_unaligned*>(bytes + 4 * word);
        low += x * (place * 2 + 1);
        high += (x ^ (x >> 15)) * (place * 0x9E3779B2u + 1);
        place += lanes;
    }
    std::uint32_t sums[2] = {0, 0};
    for (int i = 0; i < lanes; ++i) {
        sums[0] += low[i];
        sums[1] += high[i];
    }
    for (; word < end; ++word) {
        std::uint32_t x;
        __builtin_memcpy(&x, bytes + 4 * word, 4);
        sums[0] += x * (static_cast<std::uint32_t>(word) * 2 + 1);
        sums[1] += (x ^ (x >> 15)) * (static_cast<std::uint32_t>(word) * 0x9E3779B2u + 1);
    }
    return static_cast<std::uint64_t>(sums[1]) << 32 | sums[0];
}

}  // namespace rmr1::RMR1_ISA

#if RMR1_LAST_PASS
#include <atomic>

#include "parallel.h"

namespace rmr1 {

std::uint64_t checksum(const unsigned char* bytes, std::int64_t count, int threads) {
    const auto run = RMR1_CHOOSE(checksum);
    std::atomic<std::uint32_t> low{0}, high{0};
    parallel_for(count / 4, 1 << 16, threads, [&](std::int64_t begin, std::int64_t end) {
        const std::uint64_t part = run(bytes, begin, end);
        low += static_cast<std::uint32_t>(part);
        high += static_cast<std::uint32_t>(part >> 32);
    });
    std::uint32_t rest = 0;  // bytes after the last whole word
    for (std::int64_t i = count / 4 * 4; i < count; ++i) rest = rest << 8 | bytes[i];
    return (static_cast<std::uint64_t>(high.load()) << 32 | low.load()) + rest * 0x9E3779B97F4A7C15u;
}

}  // namespace rmr1
#endif
