#include "sample.h"

#include <cfloat>
#include <cmath>

#define RMR1_THIS_FILE "sample.cpp"
#include "each_isa.h"
#include "simd.h"
#include "simd_log.h"
#include "sample_noise.h"  // needs the two before it

namespace rmr1::RMR1_ISA {

// The largest logit of every so many is kept, so that a pass over what lies above a threshold
// leaves out most of a row.
constexpr std::int64_t block = 64;
// Sums run in fp32 over so many tokens, and in fp64 from there on.
constexpr std::int64_t stretch = 16 * block;
// So few logits are sorted; more are halved first.
constexpr int few = 128;

struct Row {
    const float* logits;
    std::int64_t width;
    float* peaks;    // [blocks, to a whole vector; and the same for these, and so on]
    float* weights;  // exp(z) [whole blocks], where a filter needs it
    float peak, inverse;
    Key key;
};

struct Above {
    std::int64_t count;
    double mass;
};

RMR1_INLINE std::int64_t least_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
RMR1_INLINE std::int64_t blocks_of(std::int64_t width) { return (width + block - 1) / block; }
// Room for the peaks of a row, for theirs, and so on, each to a whole vector.
static std::int64_t peaks_of(std::int64_t width) {
    const std::int64_t blocks = blocks_of(width);
    return blocks + lanes + (blocks > few ? peaks_of(blocks) : 0);
}

// Calls work(i, count) for every vector of tokens begin..end-1: `count` lanes of it are the row's.
template <class Work>
RMR1_INLINE void each_vector(std::int64_t begin, std::int64_t end, const Work& work) {
    std::int64_t i = begin;
    for (; i + lanes <= end; i += lanes) work(i, lanes);
    if (i < end) work(i, static_cast<int>(end - i));
}

RMR1_INLINE vf take(const float* p, int count) {
    return count == lanes ? load(p) : load_some(p, count, -__builtin_inff());
}

RMR1_INLINE bool any(vi x) {
    int some = 0;
    for (int i = 0; i < lanes; ++i) some |= x[i];
    return some != 0;
}

static float find_peaks(const Row& r) {
    float peak = -__builtin_inff();
    for (std::int64_t begin = 0; begin < r.width; begin += block) {
        vf top = splat(-__builtin_inff());
        each_vector(begin, least_of(begin + block, r.width),
                    [&](std::int64_t i, int count) { top = vmax(take(r.logits + i, count), top); });
        const float one = max_of(top);
        r.peaks[begin / block] = one;
        if (one > peak) peak = one;
    }
    store(r.peaks + blocks_of(r.width), splat(-__builtin_inff()));
    return peak;
}

// The sum of exp(z), which is NaN where a logit is NaN or +inf, or all are -inf.
template <bool keep>
static double weigh(const Row& r) {
    double total = 0;
    for (std::int64_t begin = 0; begin < r.width; begin += stretch) {
        vf sum{};
        each_vector(begin, least_of(begin + stretch, r.width), [&](std::int64_t i, int count) {
            const vf e = exp((take(r.logits + i, count) - r.peak) * r.inverse);
            if (keep) store(r.weights + i, e);
            sum += e;
        });
        total += sum_of(sum);
    }
    return total;
}

// How many logits are at least `least`, and their mass.
static Above above(const Row& r, float least) {
    Above found{0, 0};
    vi count{};
    for (std::int64_t begin = 0; begin < r.width; begin += stretch) {
        vf mass{};
        const std::int64_t end = least_of(begin + stretch, r.width);
        for (std::int64_t at = begin; at < end; at += block) {
            if (r.peaks[at / block] < least) continue;
            each_vector(at, least_of(at + block, end), [&](std::int64_t i, int live) {
                const vi kept = take(r.logits + i, live) >= least;
                count -= kept;
                mass += (vf)(kept & (vi)load(r.weights + i));
            });
        }
        found.mass += sum_of(mass);
    }
    for (int i = 0; i < lanes; ++i) found.count += count[i];
    return found;
}

// Integers that are ordered as the floats are, and back: its own inverse on the bits.
RMR1_INLINE std::int32_t ordered(float x) {
    std::int32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
RMR1_INLINE float from_ordered(std::int64_t image) {
    const std::int32_t one = static_cast<std::int32_t>(image);
    const std::int32_t bits = one ^ ((one >> 31) & 0x7fffffff);
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

// Between two floats: halfway at first, later halfway among the floats, which ends for sure.
RMR1_INLINE float between(float low, float high, int round) {
    const std::int64_t a = ordered(low), b = ordered(high);
    std::int64_t middle = round < 16 ? ordered(0.5f * low + 0.5f * high) : a + (b - a) / 2;
    middle = middle <= a ? a + 1 : middle >= b ? b - 1 : middle;
    return from_ordered(middle);
}

struct Candidate {
    float logit, weight;
};

// The logits from `low` to below `high`, largest first. There must not be more than `few`.
static int gather(const Row& r, float low, float high, Candidate* found) {
    int count = 0;
    for (std::int64_t at = 0; at < r.width; at += block) {
        if (r.peaks[at / block] < low) continue;
        each_vector(at, least_of(at + block, r.width), [&](std::int64_t i, int live) {
            const vf logits = take(r.logits + i, live);
            const vi inside = (logits >= low) & (logits < high);
            if (!any(inside)) return;
            for (int lane = 0; lane < live; ++lane) {
                if (!inside[lane]) continue;
                int place = count++;
                for (; place > 0 && found[place - 1].logit < logits[lane]; --place) {
                    found[place] = found[place - 1];
                }
                found[place] = {logits[lane], r.weights[i + lane]};
            }
        });
    }
    return count;
}

// The largest threshold that leaves `target` tokens, or the mass `target`: the k-th largest logit,
// or the last one of the nucleus. At least `least`, which is good for a target out of reach. By
// bisection, from the top down, where a pass reads little, until few are left to be sorted.
static float boundary(const Row& r, float least, bool by_mass, double target) {
    const auto size = [&](const Above& one) {
        return by_mass ? one.mass : static_cast<double>(one.count);
    };
    float high = r.peak, low = high;
    Above over = above(r, high), under = over;
    if (size(over) >= target) return high;
    // The k-th largest peak leaves k blocks, so k tokens at least, and not many more.
    const std::int64_t blocks = blocks_of(r.width);
    float first = r.peak - 1 / r.inverse;
    if (!by_mass && target <= static_cast<double>(blocks) && blocks > few) {
        Row peaks = r;
        peaks.logits = r.peaks;
        peaks.width = blocks;
        peaks.peaks = r.peaks + blocks + lanes;
        find_peaks(peaks);
        first = boundary(peaks, least, false, target);
    }
    for (float step = 1; size(under) < target; step *= 2) {
        if (low == least) return least;
        high = low;
        over = under;
        low = step == 1 ? first : r.peak - step / r.inverse;
        if (!(low > least) || step > 64) low = least;
        under = above(r, low);
    }
    for (int round = 0; under.count - over.count > few; ++round) {
        // Neighbouring floats: what is in between is one value.
        if (static_cast<std::int64_t>(ordered(high)) - ordered(low) <= 1) return low;
        const float middle = between(low, high, round);
        const Above found = above(r, middle);
        const bool enough = size(found) >= target;
        (enough ? low : high) = middle;
        (enough ? under : over) = found;
    }
    Candidate found[few];
    const int count = gather(r, low, high, found);
    double sum = size(over);
    for (int i = 0; i < count; ++i) {
        sum += by_mass ? found[i].weight : 1.0;
        if (sum >= target) return found[i].logit;
    }
    return low;
}

// The least logit with z >= log(min_p), by bisection among the floats.
static float min_p_boundary(const Row& r, float min_p) {
    const float floor = std::log(min_p);
    std::int64_t low = ordered(-FLT_MAX), high = ordered(r.peak);  // `high` passes
    while (high - low > 1) {
        const std::int64_t middle = low + (high - low) / 2;
        ((from_ordered(middle) - r.peak) * r.inverse >= floor ? high : low) = middle;
    }
    return from_ordered(high);
}

// The bits that a token must not exceed to reach `best`: w <= -log(1 - w) = exp(-noise), and
// z + noise >= best asks for exp(-noise) <= exp(z - best). The margin is for what rounding does.
RMR1_INLINE vi bits_limit(vf z, float best) {
    const vf limit = exp(z - best) * (0x1p31f * 1.0001f) + 1.0f;
    return limit < 0x1p31f ? __builtin_convertvector(limit, vi) : vi{} + 0x7fffffff;
}

struct Best {
    float score;
    std::int64_t token;
};

// The tokens begin..end-1 of one block, those alone whose bits may suffice.
static void draw_block(const Row& r, float least, std::int64_t begin, std::int64_t end, int limit,
                       Best* best) {
    each_vector(begin, end, [&](std::int64_t i, int count) {
        const vi bits = bits_of(r.key, i);
        if (!any(bits <= limit)) return;
        const vf logits = take(r.logits + i, count);
        const vf scores = (logits - r.peak) * r.inverse + noise_of(bits);
        const vf kept = logits >= least ? scores : splat(-__builtin_inff());
        for (int lane = 0; lane < count; ++lane) {
            // The lowest token wins a tie, and the first candidate may be a later one.
            const bool tie = kept[lane] == best->score && i + lane < best->token;
            if (kept[lane] > best->score || tie) *best = {kept[lane], i + lane};
        }
    });
}

// The token of the largest z + noise among the logits from `least` on. `first` has the largest
// logit; to begin with its score leaves out almost all others. Most blocks then show by their bits
// alone that none of their tokens can win, and no logarithm is taken.
static std::int64_t draw(const Row& r, float least, std::int64_t first) {
    Best best{noise_of(bits_of(r.key, first))[0], first};  // z is 0
    const std::int64_t blocks = blocks_of(r.width);
    for (std::int64_t group = 0; group < blocks; group += lanes) {
        // The score may rise within the group: then the limits are only wider than need be.
        const vf peaks = load(r.peaks + group), top = (peaks - r.peak) * r.inverse;
        const vi limits = bits_limit(top, best.score);
        for (int one = 0; one < lanes && group + one < blocks; ++one) {
            if (peaks[one] < least || top[one] + noise_limit < best.score) continue;
            const std::int64_t begin = (group + one) * block;
            const int limit = limits[one];
            vi hits{};
            for (int i = 0; i < block; i += lanes) hits |= bits_of(r.key, begin + i) <= limit;
            if (!any(hits)) continue;
            draw_block(r, least, begin, least_of(begin + block, r.width), limit, &best);
        }
    }
    return best.token;
}

static std::int64_t find(const Row& r, float logit) {
    std::int64_t at = 0;
    while (r.peaks[at / block] != logit) at += block;
    while (r.logits[at] != logit) ++at;
    return at;
}

static void sample_row(const SampleRows& s, std::int64_t row, float* scratch) {
    const float heat = s.temperature[row], top_p = s.top_p[row], min_p = s.min_p[row];
    const std::int64_t top_k = s.top_k[row] < s.width ? s.top_k[row] : 0;
    const bool greedy = heat == 0.0f;
    const bool filtered = !greedy && (top_k > 0 || top_p < 1.0f || min_p > 0.0f);
    Row r{};
    r.logits = s.logits + row * s.stride;
    r.width = s.width;
    r.peaks = scratch;
    r.weights = scratch + peaks_of(s.width);
    // Within bounds, since 0 * inf would be NaN.
    const float inverse = greedy ? 1.0f : 1.0f / heat;
    r.inverse = inverse > 1e30f ? 1e30f : inverse < 1e-30f ? 1e-30f : inverse;
    r.peak = find_peaks(r);
    const double total = filtered ? weigh<true>(r) : weigh<false>(r);
    if (total != total) {
        s.tokens[row] = -1;
        s.logprobs[row] = s.sampled_logprobs[row] = __builtin_nanf("");
        return;
    }
    std::int64_t token = find(r, r.peak);
    double left = total;
    if (!greedy) {
        r.key = key_of(s.keys[row]);
        float least = -FLT_MAX;
        if (filtered) {
            if (top_k > 0) least = boundary(r, least, false, static_cast<double>(top_k));
            if (top_p < 1.0f) {
                const double mass = top_k > 0 ? above(r, least).mass : total;
                least = boundary(r, least, true, top_p * mass);
            }
            if (min_p > 0.0f) {
                const float other = min_p_boundary(r, min_p);
                if (other > least) least = other;
            }
            left = above(r, least).mass;
        }
        token = draw(r, least, token);
    }
    const double z = (r.logits[token] - r.peak) * r.inverse;
    s.tokens[row] = token;
    s.logprobs[row] = static_cast<float>(z - std::log(total));
    s.sampled_logprobs[row] = greedy ? 0.0f : static_cast<float>(z - std::log(left));
}

// Numbers of scratch for one row: peaks and weights.
static std::int64_t room_of(std::int64_t width) { return peaks_of(width) + blocks_of(width) * block; }

static void sample_rows(const SampleRows& s, float* scratch, std::int64_t begin,
                        std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) sample_row(s, row, scratch);
}

}  // namespace rmr1::RMR1_ISA

#if RMR1_LAST_PASS
#include <atomic>
#include <memory>

#include "parallel.h"

namespace rmr1 {

void sample(const SampleRows& rows, int threads) {
    const auto run = RMR1_CHOOSE(sample_rows);
    // As in SwiGLU, which has an exp a number too.
    const std::int64_t grain = 16384 / (rows.width + 1) + 1;
    const std::int64_t room = RMR1_CHOOSE(room_of)(rows.width);
    const std::int64_t most = threads < rows.rows ? threads : rows.rows;
    // Here, since what runs in parallel must not throw.
    const auto scratch = std::make_unique_for_overwrite<float[]>(most > 1 ? most * room : room);
    std::atomic<std::int64_t> next{0};
    parallel_for(rows.rows, grain, threads, [&](std::int64_t begin, std::int64_t end) {
        run(rows, scratch.get() + next++ * room, begin, end);
    });
}

}  // namespace rmr1
#endif
