// Sampling for Python; rmr1/kernels/sample.py has checked the shapes and alone calls this.
#include "bindings.h"

#include <nanobind/ndarray.h>

#include "sample.h"

namespace nb = nanobind;

namespace {

template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Taken as it lies or refused with a TypeError: what is written to a converted copy is lost.
auto array(const char* name) { return nb::arg(name).noconvert(); }

void sample(const nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>& logits,
            const Vector<const std::int64_t>& keys, const Vector<const float>& temperature,
            const Vector<const std::int32_t>& top_k, const Vector<const float>& top_p,
            const Vector<const float>& min_p, const Vector<std::int64_t>& tokens,
            const Vector<float>& logprobs, const Vector<float>& sampled_logprobs, int threads) {
    if (logits.size() > 0 && logits.shape(1) > 1 && logits.stride(1) != 1) {
        throw nb::type_error("logits: their rows must be contiguous");
    }
    rmr1::sample({logits.data(), static_cast<std::int64_t>(logits.shape(0)),
                  static_cast<std::int64_t>(logits.shape(1)), logits.stride(0), keys.data(),
                  temperature.data(), top_k.data(), top_p.data(), min_p.data(), tokens.data(),
                  logprobs.data(), sampled_logprobs.data()},
                 threads);
}

}  // namespace

void rmr1_bind_sample(nb::module_& m) {
    m.def("sample", &sample, array("logits"), array("keys"), array("temperature"), array("top_k"),
          array("top_p"), array("min_p"), array("tokens"), array("logprobs"),
          array("sampled_logprobs"), nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>());
}
