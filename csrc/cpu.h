// Which instruction set the kernels use on this machine.
#pragma once

#include <string_view>

namespace rmr1 {

enum class Isa { baseline, avx2, avx512 };

// The best one that processor and operating system offer, or what `force_isa` set.
Isa isa();

// For tests: use a lesser instruction set. Returns false, and changes nothing, where this machine
// does not have it or the name is none of baseline, avx2, avx512, best.
bool force_isa(std::string_view name);

const char* name_of(Isa isa);

}  // namespace rmr1

// Picks the function of the instruction set in use: `RMR1_CHOOSE(softmax)(arguments)`. ARM has the
// baseline alone.
#if defined(__x86_64__)
#define RMR1_CHOOSE(function)                                  \
    (::rmr1::isa() == ::rmr1::Isa::avx512 ? avx512::function   \
     : ::rmr1::isa() == ::rmr1::Isa::avx2 ? avx2::function     \
                                          : baseline::function)
#else
#define RMR1_CHOOSE(function) (baseline::function)
#endif
