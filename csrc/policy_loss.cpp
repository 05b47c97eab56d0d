#include "policy_loss.h"

#include <cmath>

#define RMR1_THIS_FILE "policy_loss.cpp"
#include "each_isa.h"
#include "simd.h"

namespace rmr1::RMR1_ISA {

// exp of a larger log-ratio says only "far off".
constexpr float limit = 20.0f;

RMR1_INLINE vf where_inside(vf x, vf value) {
    return (x >= -limit) & (x <= limit) ? value : vf{};
}

// What the tokens of one vector give; lanes past the end are masked out by `live`.
struct Lanes {
    vf loss, low, high, kl, ratio, mismatch, correction, bad;
};

// `correction` of every token where all have the same, else their mean.
struct Sequence {
    float advantage, weight, log_ratio, correction;
};

RMR1_INLINE vf policy_part(vf logp, vf d, vf ratio, const Sequence& s, const PolicySettings& set,
                           vf* slope) {
    const vf clipped = bounded(ratio, set.low, set.high);
    if (set.cispo) {
        *slope = -clipped * s.advantage;
        return *slope * logp;
    }
    const vf free = ratio * s.advantage, held = clipped * s.advantage;
    vf loss = -(free < held ? free : held);
    vf flows = free <= held ? -free : vf{};
    if (set.dual > 0 && s.advantage < 0) {
        const vf cap = splat(-set.dual * s.advantage);
        flows = loss > cap ? vf{} : flows;
        loss = loss > cap ? cap : loss;
    }
    *slope = where_inside(d, flows);
    return loss;
}

RMR1_INLINE vf kl_part(vf d, const PolicySettings& set, vf* slope) {
    const vf held = bounded(d, -limit, limit);
    if (set.kl == 1) {
        *slope = where_inside(d, splat(1.0f));
        return -held;
    }
    if (set.kl == 2) {
        *slope = where_inside(d, -held);
        return 0.5f * held * held;
    }
    const vf e = exp(held);
    *slope = where_inside(d, 1.0f - e);
    return e - 1.0f - held;
}

RMR1_INLINE vf correction_of(vf mismatch, const Sequence& s, const PolicySettings& set) {
    if (set.correction == 0) return splat(1.0f);
    if (set.correction == 3) return splat(s.correction);
    const vf w = exp(bounded(mismatch, -limit, limit));
    if (set.correction == 1) return w > set.correction_high ? splat(set.correction_high) : w;
    return (w < set.correction_low) | (w > set.correction_high) ? vf{} : w;
}

RMR1_INLINE Lanes vector_of(vf logp, vf old, const vf* ref, const vf* rollout, const Sequence& s,
                            const PolicySettings& set, vf* slope) {
    Lanes out{};
    const vf d = set.sequence_ratio ? splat(s.log_ratio) : logp - old;
    out.ratio = exp(bounded(d, -limit, limit));
    vf loss = policy_part(logp, d, out.ratio, s, set, slope);
    const vf one = splat(1.0f);
    if (s.advantage < 0) out.low = out.ratio < set.low ? one : vf{};
    if (s.advantage > 0) out.high = out.ratio > set.high ? one : vf{};
    out.correction = one;
    if (rollout) {
        const vf apart = old - *rollout;
        out.mismatch = apart < 0.0f ? -apart : apart;
        out.correction = correction_of(apart, s, set);
        loss *= out.correction;
        // The ratio of a sequence is that of all its tokens, so each one moves the loss of all.
        *slope *= set.sequence_ratio ? splat(s.correction) : out.correction;
    }
    if (ref) {
        vf kl_slope;
        out.kl = kl_part(*ref - logp, set, &kl_slope);
        loss += set.beta * out.kl;
        *slope += set.beta * kl_slope;
    }
    out.loss = loss * s.weight;
    *slope *= s.weight;
    out.bad = (out.loss - out.loss) == 0.0f ? vf{} : one;  // NaN or infinite
    return out;
}

// Lanes of `x` past `count` become `fill`.
RMR1_INLINE vf first(vf x, int count, float fill) {
    for (int i = count; i < lanes; ++i) x[i] = fill;
    return x;
}

RMR1_INLINE void add(const Lanes& one, int count, double* loss, PolicySums* sums) {
    const bool all = count == lanes;
    const auto sum = [&](vf x) { return static_cast<double>(sum_of(all ? x : first(x, count, 0))); };
    *loss += sum(one.loss);
    sums->clipped_low += sum(one.low);
    sums->clipped_high += sum(one.high);
    sums->kl += sum(one.kl);
    sums->ratio += sum(one.ratio);
    sums->mismatch += sum(one.mismatch);
    sums->correction += sum(one.correction);
    sums->bad += sum(one.bad);
    const double top = max_of(all ? one.ratio : first(one.ratio, count, 0));
    const double bottom = -max_of(-(all ? one.ratio : first(one.ratio, count, __builtin_inff())));
    if (top > sums->ratio_max) sums->ratio_max = top;
    if (bottom < sums->ratio_min) sums->ratio_min = bottom;
}

// The first `count` lanes from memory, the others 0.
RMR1_INLINE vf take(const float* p, int count) {
    return count == lanes ? load(p) : load_some(p, count, 0);
}

// Mean of a - b over a sequence.
static float mean_apart(const float* a, const float* b, std::int64_t count) {
    double total = 0;
    for (std::int64_t i = 0; i < count; ++i) total += static_cast<double>(a[i]) - b[i];
    return static_cast<float>(total / static_cast<double>(count));
}

// Of corrections by token, what the slope of a sequence's ratio needs of them.
static float mean_correction(const float* old, const float* rollout, std::int64_t count,
                             const Sequence& s, const PolicySettings& set) {
    double total = 0;
    for (std::int64_t i = 0; i < count; i += lanes) {
        const int here = count - i < lanes ? static_cast<int>(count - i) : lanes;
        const vf w = correction_of(take(old + i, here) - take(rollout + i, here), s, set);
        total += static_cast<double>(sum_of(first(w, here, 0)));
    }
    return static_cast<float>(total / static_cast<double>(count));
}

// What the tokens of a sequence share.
static Sequence sequence_of(const PolicyTokens& t, std::int64_t s, const PolicySettings& set) {
    const std::int64_t begin = t.offsets[s], count = t.offsets[s + 1] - begin;
    Sequence one{t.advantages[s], t.weights[s], 0, 1};
    if (set.sequence_ratio) one.log_ratio = mean_apart(t.logprobs + begin, t.old + begin, count);
    if (!t.rollout) return one;
    const float *old = t.old + begin, *rollout = t.rollout + begin;
    if (set.correction == 3) {
        const float w = std::exp(mean_apart(old, rollout, count));
        // NaN stays, and shows in the loss.
        one.correction = w < set.correction_low || w > set.correction_high ? 0.0f
                         : std::isnan(w)                                  ? w
                                                                          : 1.0f;
    } else if (set.correction != 0 && set.sequence_ratio) {
        one.correction = mean_correction(old, rollout, count, one, set);
    }
    return one;
}

static double policy_loss(const PolicyTokens& t, const PolicySettings& set, float* slope,
                          PolicySums* sums) {
    double loss = 0;
    for (std::int64_t s = 0; s < t.sequences; ++s) {
        const std::int64_t begin = t.offsets[s], end = t.offsets[s + 1];
        if (begin == end) continue;
        const Sequence one = sequence_of(t, s, set);
        for (std::int64_t i = begin; i < end; i += lanes) {
            const int count = end - i < lanes ? static_cast<int>(end - i) : lanes;
            vf ref{}, rollout{}, gradient;
            if (t.ref) ref = take(t.ref + i, count);
            if (t.rollout) rollout = take(t.rollout + i, count);
            const Lanes found = vector_of(take(t.logprobs + i, count), take(t.old + i, count),
                                          t.ref ? &ref : nullptr, t.rollout ? &rollout : nullptr,
                                          one, set, &gradient);
            add(found, count, &loss, sums);
            if (count == lanes) {
                store(slope + i, gradient);
            } else {
                store_some(slope + i, gradient, count);
            }
        }
    }
    return loss;
}

}  // namespace rmr1::RMR1_ISA

#if RMR1_LAST_PASS
namespace rmr1 {

double policy_loss(const PolicyTokens& tokens, const PolicySettings& settings, float* slope,
                   PolicySums* sums) {
    *sums = {};
    sums->ratio_min = __builtin_inf();
    // One thread: a step has some ten thousand tokens, and the sums must not depend on threads.
    return RMR1_CHOOSE(policy_loss)(tokens, settings, slope, sums);
}

}  // namespace rmr1
#endif
