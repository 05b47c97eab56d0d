// The natural logarithm in vectors: what simd.h has not. Included after it, once per instruction
// set, so without a guard.

namespace rmr1::RMR1_ISA {

// log(x), 2 ulp, for normal x above 0; of anything else nothing is promised. With x = 2^n (1 + f)
// and 1 + f between the roots of 1/2 and 2: n ln 2 + log(1 + f), a polynomial of degree 9 (minimax
// coefficients as in Cephes). Near 1 it is as exact as elsewhere, and log(1) is 0.
RMR1_INLINE vf log(vf x) {
    const vi root = vi{} + 0x3f3504f3;  // the bits of sqrt(1/2)
    const vi apart = (vi)x - root;
    const vf n = __builtin_convertvector(apart >> 23, vf);
    const vf f = (vf)((apart & 0x007fffff) + root) - 1.0f;
    vf y = splat(7.0376836292e-2f);
    y = y * f - 1.1514610310e-1f;
    y = y * f + 1.1676998740e-1f;
    y = y * f - 1.2420140846e-1f;
    y = y * f + 1.4249322787e-1f;
    y = y * f - 1.6668057665e-1f;
    y = y * f + 2.0000714765e-1f;
    y = y * f - 2.4999993993e-1f;
    y = y * f + 3.3333331174e-1f;
    const vf square = f * f;
    y = y * (f * square) - n * 2.12194440e-4f - 0.5f * square;
    return n * 0.693359375f + (f + y);
}

}  // namespace rmr1::RMR1_ISA
