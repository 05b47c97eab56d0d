// Compiles a kernel file once per instruction set, the fastest one for the machine to be chosen at
// run time (the idea of Highway's foreach_target). A kernel file begins with
//
//     #define RMR1_THIS_FILE "my_kernel.cpp"
//     #include "each_isa.h"
//     #include "simd.h"
//
// and puts its kernels into namespace rmr1::RMR1_ISA. What is needed once (the dispatch) stands
// behind `#if RMR1_LAST_PASS`. Kernel files include no other headers before that line but those of
// plain declarations: an inline function of the standard library that was compiled for AVX-512
// might be the copy that the linker keeps for everybody.
#if !defined(RMR1_ISA)

#include "cpu.h"

#if defined(__x86_64__)
#define RMR1_LAST_PASS 0
#define RMR1_ISA avx512
#define RMR1_LANES 16
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#include RMR1_THIS_FILE
#pragma GCC pop_options
#undef RMR1_ISA
#undef RMR1_LANES

#define RMR1_ISA avx2
#define RMR1_LANES 8
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include RMR1_THIS_FILE
#pragma GCC pop_options
#undef RMR1_ISA
#undef RMR1_LANES
#undef RMR1_LAST_PASS
#endif

// What every machine has: SSE2 on x86-64, NEON on ARM.
#define RMR1_LAST_PASS 1
#define RMR1_ISA baseline
#define RMR1_LANES 4

#endif
