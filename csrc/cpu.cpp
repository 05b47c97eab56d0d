#include "cpu.h"

#include <atomic>

namespace rmr1 {
namespace {

Isa best() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return Isa::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::baseline;
}

std::atomic<Isa>& current() {
    static std::atomic<Isa> value{best()};
    return value;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

bool force_isa(std::string_view name) {
    Isa wanted = best();
    if (name == "baseline") {
        wanted = Isa::baseline;
    } else if (name == "avx2") {
        wanted = Isa::avx2;
    } else if (name == "avx512") {
        wanted = Isa::avx512;
    } else if (name != "best") {
        return false;
    }
    if (wanted > best()) return false;
    current().store(wanted, std::memory_order_relaxed);
    return true;
}

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        default: return "baseline";
    }
}

}  // namespace rmr1
