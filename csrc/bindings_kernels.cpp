// The CPU kernels for Python. Arrays come in through DLPack, so a torch tensor is taken as it lies;
// shapes have been checked by rmr1/kernels/*.py, which alone call these.
#include "bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "cpu.h"
#include "token_logprob.h"

namespace nb = nanobind;

namespace {

template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
// A matrix whose rows are contiguous, at any distance from each other.
template <class T>
using Rows = nb::ndarray<T, nb::ndim<2>, nb::device::cpu>;
template <class T>
using Maybe = std::optional<Vector<T>>;

template <class T>
T* data(const Maybe<T>& vector) {
    return vector ? vector->data() : nullptr;
}

rmr1::LogitTile tile_of(const Rows<float>& z, std::int64_t first,
                        const Vector<const std::int64_t>& targets) {
    return {z.data(), static_cast<std::int64_t>(z.shape(0)), static_cast<std::int64_t>(z.shape(1)),
            z.stride(0), first, targets.data()};
}

void logit_stats(const Rows<float>& z, std::int64_t first,
                 const Vector<const std::int64_t>& targets, const Vector<float>& peak,
                 const Vector<float>& sum, const Maybe<float>& dot, const Vector<float>& target,
                 int threads) {
    rmr1::logit_stats(tile_of(z, first, targets),
                      {peak.data(), sum.data(), data(dot), target.data()}, threads);
}

void logit_gradient(const Rows<float>& z, std::int64_t first,
                    const Vector<const std::int64_t>& targets, const Vector<const float>& peak,
                    const Vector<const float>& log_sum, const Maybe<const float>& entropy,
                    const Maybe<const float>& on_logprob, const Maybe<const float>& on_entropy,
                    int threads) {
    rmr1::logit_gradient(
        tile_of(z, first, targets),
        {peak.data(), log_sum.data(), data(entropy), data(on_logprob), data(on_entropy)}, threads);
}

}  // namespace

void rmr1_bind_kernels(nb::module_& m) {
    m.def("isa", [] { return rmr1::name_of(rmr1::isa()); });
    m.def("force_isa", [](const std::string& name) { return rmr1::force_isa(name); }, nb::arg("name"));
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    m.def("logit_stats", &logit_stats, nb::arg("z"), nb::arg("first"), nb::arg("targets"),
          nb::arg("peak"), nb::arg("sum"), nb::arg("dot").none(), nb::arg("target"),
          nb::arg("threads"), unlocked);
    m.def("logit_gradient", &logit_gradient, nb::arg("z"), nb::arg("first"), nb::arg("targets"),
          nb::arg("peak"), nb::arg("log_sum"), nb::arg("entropy").none(),
          nb::arg("on_logprob").none(), nb::arg("on_entropy").none(), nb::arg("threads"), unlocked);
}
