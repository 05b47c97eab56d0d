// The CPU kernels for Python. Arrays come in through DLPack, so a torch tensor is taken as it lies;
// shapes have been checked by rmr1/kernels/*.py, which alone call these.
#include "bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <array>

#include "cpu.h"
#include "group_advantage.h"
#include "policy_loss.h"
#include "rmsnorm.h"
#include "rope.h"
#include "swiglu.h"
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

// `settings`: the fields of PolicySettings in their order. Returns the loss and the sums.
nb::tuple policy_loss(const Vector<const float>& logprobs, const Vector<const float>& old,
                      const Maybe<const float>& ref, const Maybe<const float>& rollout,
                      const Vector<const std::int64_t>& offsets,
                      const Vector<const float>& advantages, const Vector<const float>& weights,
                      const std::array<float, 10>& settings, const Vector<float>& slope) {
    const auto& f = settings;
    const rmr1::PolicySettings set{f[0] != 0, f[1] != 0, f[2], f[3], f[4], f[5],
                                   static_cast<int>(f[6]), static_cast<int>(f[7]), f[8], f[9]};
    const rmr1::PolicyTokens tokens{logprobs.data(), old.data(), data(ref), data(rollout),
                                    offsets.data(), advantages.data(), weights.data(),
                                    static_cast<std::int64_t>(advantages.shape(0))};
    rmr1::PolicySums sums;
    double loss;
    {
        nb::gil_scoped_release unlocked;
        loss = rmr1::policy_loss(tokens, set, slope.data(), &sums);
    }
    return nb::make_tuple(loss, sums.clipped_low, sums.clipped_high, sums.kl, sums.ratio,
                          sums.ratio_max, sums.ratio_min, sums.mismatch, sums.correction, sums.bad);
}

void group_advantages(const Vector<const float>& rewards, const Vector<const std::int64_t>& offsets,
                      bool divide_by_std, bool leave_one_out,
                      const Maybe<const std::int64_t>& token_offsets, const Vector<float>& out,
                      float eps) {
    rmr1::group_advantages(rewards.data(), offsets.data(),
                           static_cast<std::int64_t>(offsets.shape(0)) - 1, divide_by_std,
                           leave_one_out, data(token_offsets), out.data(), eps);
}

using Matrix = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <class Array>
auto* data_of(const std::optional<Array>& array) {
    return array ? array->data() : nullptr;
}

template <class Array>
std::int64_t size(const Array& array, std::size_t axis) {
    return static_cast<std::int64_t>(array.shape(axis));
}

void swiglu(const ConstMatrix& gate, const ConstMatrix& up, const Matrix& out, int threads) {
    rmr1::swiglu(gate.data(), up.data(), out.data(), static_cast<std::int64_t>(out.size()), threads);
}

void swiglu_backward(const ConstMatrix& on_out, const ConstMatrix& gate, const ConstMatrix& up,
                     const Matrix& on_gate, const Matrix& on_up, int threads) {
    rmr1::swiglu_backward(on_out.data(), gate.data(), up.data(), on_gate.data(), on_up.data(),
                          static_cast<std::int64_t>(on_out.size()), threads);
}

void rmsnorm(const ConstMatrix& x, const std::optional<ConstMatrix>& added,
             const Vector<const float>& weight, const std::optional<Matrix>& sum, const Matrix& y,
             const Maybe<float>& scale, float eps, int threads) {
    rmr1::rmsnorm({x.data(), data_of(added), weight.data(), data_of(sum), y.data(), data(scale),
                   size(x, 0), size(x, 1), eps},
                  threads);
}

void rmsnorm_backward(const ConstMatrix& on_y, const std::optional<ConstMatrix>& on_sum,
                      const ConstMatrix& x, const Vector<const float>& weight,
                      const Vector<const float>& scale, const Matrix& on_x,
                      const Matrix& on_weight, int threads) {
    rmr1::rmsnorm_backward({on_y.data(), data_of(on_sum), x.data(), weight.data(), scale.data(),
                            on_x.data(), on_weight.data(), size(x, 0), size(x, 1),
                            size(on_weight, 0)},
                           threads);
}

void rope(const nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>& x, const ConstMatrix& cos,
          const ConstMatrix& sin, const nb::ndarray<float, nb::ndim<3>, nb::c_contig>& y, bool back,
          int threads) {
    rmr1::rope({x.data(), cos.data(), sin.data(), y.data(), size(x, 0), size(x, 1), size(x, 2),
                x.stride(0), back},
               threads);
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
    m.def("group_advantages", &group_advantages, nb::arg("rewards"), nb::arg("offsets"),
          nb::arg("divide_by_std"), nb::arg("leave_one_out"), nb::arg("token_offsets").none(),
          nb::arg("out"), nb::arg("eps"), unlocked);
    m.def("policy_loss", &policy_loss, nb::arg("logprobs"), nb::arg("old"), nb::arg("ref").none(),
          nb::arg("rollout").none(), nb::arg("offsets"), nb::arg("advantages"), nb::arg("weights"),
          nb::arg("settings"), nb::arg("slope"));
    m.def("swiglu", &swiglu, nb::arg("gate"), nb::arg("up"), nb::arg("out"), nb::arg("threads"),
          unlocked);
    m.def("swiglu_backward", &swiglu_backward, nb::arg("on_out"), nb::arg("gate"), nb::arg("up"),
          nb::arg("on_gate"), nb::arg("on_up"), nb::arg("threads"), unlocked);
    m.def("rmsnorm", &rmsnorm, nb::arg("x"), nb::arg("added").none(), nb::arg("weight"),
          nb::arg("sum").none(), nb::arg("y"), nb::arg("scale").none(), nb::arg("eps"),
          nb::arg("threads"), unlocked);
    m.def("rmsnorm_backward", &rmsnorm_backward, nb::arg("on_y"), nb::arg("on_sum").none(),
          nb::arg("x"), nb::arg("weight"), nb::arg("scale"), nb::arg("on_x"), nb::arg("on_weight"),
          nb::arg("threads"), unlocked);
    m.def("rope", &rope, nb::arg("x"), nb::arg("cos"), nb::arg("sin"), nb::arg("y"),
          nb::arg("back"), nb::arg("threads"), unlocked);
}
