#include "packed_attention.h"

#define RMR1_THIS_FILE "packed_attention.cpp"
#include "each_isa.h"
#include "simd.h"
#include "attention_tiles.h"

// Forward and backward over one block of rows, in tiles (attention_tiles.h); then, compiled once, how
// the blocks are shared out.

namespace rmr1::RMR1_ISA {

// --- Forward -------------------------------------------------------------------------------------

// The next step of a streaming softmax: scores become weights, `o` is rescaled.
static void weigh(float* s, std::int64_t keys, std::int64_t width, float* peak, float* sum,
                  float* o) {
    for (int v = 0; v < vectors; ++v) {
        const vf before = load(peak + v * lanes);
        vf top = before;
        for (std::int64_t j = 0; j < keys; ++j) top = vmax(load(s + j * tile + v * lanes), top);
        vf total = {};
        // A row that has seen nothing yet has no peak to subtract.
        const vf base = top > splat(-3e38f) ? top : vf{};
        for (std::int64_t j = 0; j < keys; ++j) {
            const vf weight = exp(load(s + j * tile + v * lanes) - base);
            store(s + j * tile + v * lanes, weight);
            total += weight;
        }
        const vf fall = exp(before - base);
        store(sum + v * lanes, load(sum + v * lanes) * fall + total);
        store(peak + v * lanes, top);
        for (std::int64_t d = 0; d < width; ++d) {
            float* to = o + d * tile + v * lanes;
            store(to, load(to) * fall);
        }
    }
}

static void forward_block(const PackedAttention& a, const AttentionRows& b, float* out, float* lse) {
    const std::int64_t width = a.width;
    float* memory = static_cast<float*>(__builtin_alloca_with_align(
        4 * (block * 2 * width + keys_at_once * tile + 3 * block), 512));
    float *q = memory, *o = q + block * width, *s = o + block * width;
    float *peak = s + keys_at_once * tile, *sum = peak + block, *factor = sum + block;
    pack(b, a.q, a.q_stride, width, a.scale, q);
    for (std::int64_t i = 0; i < block * width; ++i) o[i] = 0;
    for (std::int64_t i = 0; i < block; ++i) {
        peak[i] = -__builtin_inff();
        sum[i] = 0;
    }
    for (int part = 0; part < 2; ++part) {
        const KeyRun run = run_of(b, part);
        for (std::int64_t key = run.begin; key < run.end; key += keys_at_once) {
            const std::int64_t left = run.end - key;
            const std::int64_t keys = left < keys_at_once ? left : keys_at_once;
            const float* k = a.k + key * a.k_stride + b.head * width;
            const float* v = a.v + key * a.v_stride + b.head * width;
            for (std::int64_t t = 0; t * tile < b.rows; ++t) {
                const std::int64_t last = (t + 1) * tile < b.rows ? (t + 1) * tile : b.rows;
                if (run.causal && key > token_of(b, last - 1)) continue;
                all_dots(k, a.k_stride, q + t * tile * width, width, keys, s);
                if (run.causal) hide(b, t, key, keys, s);
                weigh(s, keys, width, peak + t * tile, sum + t * tile, o + t * tile * width);
                mix(v, a.v_stride, s, keys, width, o + t * tile * width);
            }
        }
    }
    for (std::int64_t row = 0; row < b.rows; ++row) {
        factor[row] = 1.0f / sum[row];
        lse[token_of(b, row) * a.heads + head_of(b, row)] = peak[row] + __builtin_logf(sum[row]);
    }
    unpack(b, o, a.heads, width, factor, 0, out);
}

// --- Backward ------------------------------------------------------------------------------------

// What a block knows of its rows: q (scaled) and the gradient, in tiles and row by row; what P and dS
// are made of; and the gradient of q.
struct Gradients {
    float *q, *g, *on_q;        // tiles [width][tile]
    float *q_rows, *g_rows;     // [block][width]
    float *p, *ds;              // [tiles][keys_at_once][tile]
    float *lse, *own;           // [block]
};

// P = exp(S - lse), dS = P (dP - own), in place of S and dP.
RMR1_INLINE void slopes(const Gradients& s, std::int64_t t, std::int64_t keys, float* p, float* ds) {
    for (int v = 0; v < vectors; ++v) {
        const vf lse = load(s.lse + t * tile + v * lanes), own = load(s.own + t * tile + v * lanes);
        for (std::int64_t j = 0; j < keys; ++j) {
            float *weight = p + j * tile + v * lanes, *slope = ds + j * tile + v * lanes;
            const vf one = exp(load(weight) - lse);
            store(weight, one);
            store(slope, one * (load(slope) - own));
        }
    }
}

static void read_rows(const PackedAttention& a, const AttentionRows& b, const float* on_out,
                      const float* out, const float* lse, const Gradients& s) {
    const std::int64_t width = a.width, stride = a.heads * width;
    pack(b, a.q, a.q_stride, width, a.scale, s.q);
    pack(b, on_out, stride, width, 1, s.g);
    for (std::int64_t row = 0; row < block; ++row) {
        s.lse[row] = __builtin_inff();  // rows that are not there weigh nothing
        s.own[row] = 0;
        if (row >= b.rows) continue;
        const std::int64_t at = token_of(b, row) * a.heads + head_of(b, row);
        const float* q = a.q + token_of(b, row) * a.q_stride + head_of(b, row) * width;
        const float *g = on_out + at * width, *o = out + at * width;
        float sum = 0;
        for (std::int64_t d = 0; d < width; ++d) {
            s.q_rows[row * width + d] = q[d] * a.scale;
            s.g_rows[row * width + d] = g[d];
            sum += g[d] * o[d];
        }
        s.lse[row] = lse[at];
        s.own[row] = sum;
    }
    for (std::int64_t i = 0; i < block * width; ++i) s.on_q[i] = 0;
}

// One block of rows: writes its on_q, adds to the group's on_k and on_v, [keys][width] from `start`.
static void backward_block(const PackedAttention& a, const AttentionRows& b, const float* on_out,
                           const float* out, const float* lse, std::int64_t start, float* on_q,
                           float* on_k, float* on_v) {
    const std::int64_t width = a.width;
    float* memory = static_cast<float*>(__builtin_alloca_with_align(
        4 * (block * 5 * width + 2 * keys_at_once * block + 2 * block), 512));
    Gradients s;
    s.q = memory;
    s.g = s.q + block * width;
    s.on_q = s.g + block * width;
    s.q_rows = s.on_q + block * width;
    s.g_rows = s.q_rows + block * width;
    s.p = s.g_rows + block * width;
    s.ds = s.p + keys_at_once * block;
    s.lse = s.ds + keys_at_once * block;
    s.own = s.lse + block;
    read_rows(a, b, on_out, out, lse, s);
    for (int part = 0; part < 2; ++part) {
        const KeyRun run = run_of(b, part);
        for (std::int64_t key = run.begin; key < run.end; key += keys_at_once) {
            const std::int64_t left = run.end - key;
            const std::int64_t keys = left < keys_at_once ? left : keys_at_once;
            const float* k = a.k + key * a.k_stride + b.head * width;
            const float* v = a.v + key * a.v_stride + b.head * width;
            for (std::int64_t t = 0; t * tile < b.rows; ++t) {
                float *p = s.p + t * keys_at_once * tile, *ds = s.ds + t * keys_at_once * tile;
                all_dots(k, a.k_stride, s.q + t * tile * width, width, keys, p);
                if (run.causal) hide(b, t, key, keys, p);
                all_dots(v, a.v_stride, s.g + t * tile * width, width, keys, ds);
                slopes(s, t, keys, p, ds);
                mix(k, a.k_stride, ds, keys, width, s.on_q + t * tile * width);
            }
            const std::int64_t at = (key - start) * width;
            all_outer(s.p, s.g_rows, b.rows, keys, width, on_v + at);
            all_outer(s.ds, s.q_rows, b.rows, keys, width, on_k + at);
        }
    }
    unpack(b, s.on_q, a.heads, width, nullptr, a.scale, on_q);
}

static std::int64_t rows_of_block() { return block; }

}  // namespace rmr1::RMR1_ISA

#if RMR1_LAST_PASS
#include <algorithm>
#include <vector>

#include "parallel.h"

namespace rmr1 {
namespace {

// Some blocks of rows of a group, for one head of keys, with sums of their own for on_k and on_v.
struct Task {
    std::int64_t group, head, share;
};

// Into how many shares a group is cut: so that threads are busy, but not by their number, which
// must not change what is added to what.
std::int64_t shares_of(std::int64_t rows) {
    return std::clamp<std::int64_t>(rows / 768, 1, 4);
}

struct Block {
    std::int64_t segment, first, rows;
};

std::vector<Block> blocks_of(const PackedAttention& a, const AttentionGroup& group,
                             std::int64_t size) {
    std::vector<Block> found;
    const std::int64_t heads = a.heads / a.kv_heads;
    for (std::int64_t s = group.first; s < group.last; ++s) {
        const std::int64_t rows = (a.segments[s].end - a.segments[s].begin) * heads;
        for (std::int64_t first = 0; first < rows; first += size) {
            found.push_back({s, first, std::min(size, rows - first)});
        }
    }
    return found;
}

}  // namespace

void packed_attention(const PackedAttention& a, float* out, float* lse, int threads) {
    const auto run = RMR1_CHOOSE(forward_block);
    const std::int64_t size = RMR1_CHOOSE(rows_of_block)(), heads = a.heads / a.kv_heads;
    std::vector<Block> blocks;
    for (std::int64_t g = 0; g < a.groups_count; ++g) {
        const auto own = blocks_of(a, a.groups[g], size);
        blocks.insert(blocks.end(), own.begin(), own.end());
    }
    const auto count = static_cast<std::int64_t>(blocks.size());
    parallel_tasks(count * a.kv_heads, threads, [&](std::int64_t task) {
        const Block& b = blocks[count - 1 - task / a.kv_heads];  // the last ones see the most keys
        run(a, {&a.segments[b.segment], task % a.kv_heads, heads, b.first, b.rows}, out, lse);
    });
}

void packed_attention_backward(const PackedAttention& a, const float* on_out, const float* out,
                               const float* lse, float* on_q, float* on_k, float* on_v,
                               int threads) {
    const auto run = RMR1_CHOOSE(backward_block);
    const std::int64_t size = RMR1_CHOOSE(rows_of_block)(), heads = a.heads / a.kv_heads;
    std::vector<std::vector<Block>> blocks;
    std::vector<Task> tasks;
    std::vector<std::int64_t> shares, sums;  // of each group; where its sums begin
    std::int64_t total = 0;
    for (std::int64_t g = 0; g < a.groups_count; ++g) {
        blocks.push_back(blocks_of(a, a.groups[g], size));
        const auto& last = a.segments[a.groups[g].last - 1];
        const std::int64_t keys = last.end - a.segments[a.groups[g].first].begin;
        shares.push_back(shares_of(keys * heads));
        sums.push_back(total);
        total += shares[g] * a.kv_heads * 2 * keys * a.width;
        for (std::int64_t head = 0; head < a.kv_heads; ++head) {
            for (std::int64_t share = 0; share < shares[g]; ++share) {
                tasks.push_back({g, head, share});
            }
        }
    }
    std::vector<float> scratch(total);
    const auto start_of = [&](std::int64_t g) { return a.segments[a.groups[g].first].begin; };
    const auto keys_of = [&](std::int64_t g) {
        return a.segments[a.groups[g].last - 1].end - start_of(g);
    };
    const auto sum_of = [&](std::int64_t g, std::int64_t head, std::int64_t share) {
        return scratch.data() + sums[g] + (head * shares[g] + share) * 2 * keys_of(g) * a.width;
    };
    parallel_tasks(static_cast<std::int64_t>(tasks.size()), threads, [&](std::int64_t number) {
        const Task& task = tasks[number];
        const auto& own = blocks[task.group];
        float* mine = sum_of(task.group, task.head, task.share);
        // Every so many blocks: early and late ones, which see few keys and many.
        for (std::size_t i = task.share; i < own.size(); i += shares[task.group]) {
            run(a, {&a.segments[own[i].segment], task.head, heads, own[i].first, own[i].rows}, on_out,
                out, lse, start_of(task.group), on_q, mine,
                mine + keys_of(task.group) * a.width);
        }
    });
    for (std::int64_t g = 0; g < a.groups_count; ++g) {
        const std::int64_t keys = keys_of(g), start = start_of(g);
        parallel_for(keys * a.kv_heads, 64, threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) {
                const std::int64_t key = i / a.kv_heads, head = i % a.kv_heads;
                for (int which = 0; which < 2; ++which) {
                    float* to = (which ? on_v : on_k) + ((start + key) * a.kv_heads + head) * a.width;
                    for (std::int64_t share = 0; share < shares[g]; ++share) {
                        const float* from = sum_of(g, head, share) + (which * keys + key) * a.width;
                        for (std::int64_t d = 0; d < a.width; ++d) {
                            to[d] = share ? to[d] + from[d] : from[d];
                        }
                    }
                }
            }
        });
    }
}

}  // namespace rmr1
#endif
