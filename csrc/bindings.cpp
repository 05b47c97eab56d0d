// The extension module rmr1._C; rmr1/_C.pyi describes it.
#include "bindings.h"

NB_MODULE(_C, m) {
    m.doc() = "Native parts of rmr1: the verdict parser and the CPU kernels.";
    rmr1_bind_verdict(m);
    rmr1_bind_kernels(m);
    rmr1_bind_generation(m);
    rmr1_bind_sample(m);
}
