#include "paged_attention.h"

#define RMR1_THIS_FILE "paged_attention.cpp"
#include "each_isa.h"
#include "simd.h"

// Both products are small matrix products of a block of queries with a tile of keys, and of its
// weights with the tile's values: vectors run over 16 keys, or over 16 dimensions.

namespace rmr1::RMR1_ISA {

constexpr int group = 16;               // keys of one column block; the cache pads blocks to it
constexpr int vectors = group / lanes;  // a group of 16 floats in registers
constexpr int at_once = RMR1_LANES == 16 ? 12 : RMR1_LANES == 8 ? 6 : 3;
static_assert(attention_tile % group == 0);

// What a task knows of its queries: scaled q, weights of a tile, and the running softmax.
struct Queries {
    float *q, *weights, *out, *peak, *sum;  // [Q, D], [Q, tile], [Q, D], [Q], [Q]
    std::int64_t* seen;                     // [Q]
};

// A run of keys in one group of one block.
struct Piece {
    const float *keys, *values;
    std::int64_t count;
};

// `ahead`: keys that are wanted next, which no processor can foresee, or null.
template <int R>
RMR1_INLINE void scores(const float* q, std::int64_t width, const float* keys, std::int64_t stride,
                        const float* ahead, float* to) {
    vf sums[R][vectors] = {};
    for (std::int64_t d = 0; d < width; ++d) {
        if (ahead) __builtin_prefetch(ahead + d * stride);
        vf k[vectors];
        for (int v = 0; v < vectors; ++v) k[v] = load(keys + d * stride + v * lanes);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const vf one = splat(q[r * width + d]);
            for (int v = 0; v < vectors; ++v) sums[r][v] += one * k[v];
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < vectors; ++v) store(to + r * attention_tile + v * lanes, sums[r][v]);
    }
}

// out[r][d .. d + V lanes] += weights[r] . values, over all pieces of a tile; `ahead` as above.
template <int R, int V>
RMR1_INLINE void mix(const float* weights, const Piece* pieces, const Piece* ahead, int count,
                     std::int64_t d, float* out, std::int64_t width) {
    vf sums[R][V];
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) sums[r][v] = load(out + r * width + d + v * lanes);
    }
    for (int p = 0; p < count; ++p) {
        const float* values = pieces[p].values + d;
        for (std::int64_t j = 0; j < pieces[p].count; ++j) {
            vf x[V];
            for (int v = 0; v < V; ++v) x[v] = load(values + j * width + v * lanes);
            if (ahead) __builtin_prefetch(ahead[p].values + d + j * width);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const vf one = splat(weights[r * attention_tile + p * group + j]);
                for (int v = 0; v < V; ++v) sums[r][v] += one * x[v];
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) store(out + r * width + d + v * lanes, sums[r][v]);
    }
}

template <int R>
static void mix_rows(const float* weights, const Piece* pieces, const Piece* ahead, int count,
                     float* out, std::int64_t width) {
    std::int64_t d = 0;
    for (; d + group <= width; d += group) {
        mix<R, vectors>(weights, pieces, ahead, count, d, out, width);
    }
    for (; d + lanes <= width; d += lanes) {
        mix<R, 1>(weights, pieces, nullptr, count, d, out, width);
    }
    for (; d < width; ++d) {  // a head size that is no multiple of a vector
        for (int r = 0; r < R; ++r) {
            float sum = out[r * width + d];
            for (int p = 0; p < count; ++p) {
                for (std::int64_t j = 0; j < pieces[p].count; ++j) {
                    const float weight = weights[r * attention_tile + p * group + j];
                    sum = __builtin_fmaf(weight, pieces[p].values[j * width + d], sum);
                }
            }
            out[r * width + d] = sum;
        }
    }
}

// The next step of a streaming softmax: scores of `columns` keys become weights, `out` is rescaled.
// Query i sees keys from `first` on up to seen[i].
static void weigh(const Queries& s, std::int64_t i, std::int64_t first, const Piece* pieces,
                  int count, std::int64_t width) {
    float* row = s.weights + i * attention_tile;
    const float lowest = -__builtin_inff();
    std::int64_t key = first;
    for (int p = 0; p < count; ++p) {  // hide what the query does not see, and padding
        const std::int64_t left = s.seen[i] - key;
        const std::int64_t seen = left < pieces[p].count ? left : pieces[p].count;
        for (std::int64_t j = seen > 0 ? seen : 0; j < group; ++j) row[p * group + j] = lowest;
        key += pieces[p].count;
    }
    vf top = splat(lowest);
    for (int c = 0; c < count * group; c += lanes) top = vmax(load(row + c), top);
    float peak = max_of(top);
    if (!(peak > s.peak[i])) peak = s.peak[i];
    if (peak == lowest) {  // nothing seen so far
        for (int c = 0; c < count * group; c += lanes) store(row + c, vf{});
        return;
    }
    vf total = splat(0);
    for (int c = 0; c < count * group; c += lanes) {
        const vf weight = exp(load(row + c) - peak);
        store(row + c, weight);
        total += weight;
    }
    const float fall = s.peak[i] == peak ? 1.0f : max_of(exp(splat(s.peak[i] - peak)));
    s.sum[i] = s.sum[i] * fall + sum_of(total);
    s.peak[i] = peak;
    if (fall == 1.0f) return;
    float* out = s.out + i * width;
    std::int64_t d = 0;
    for (; d + lanes <= width; d += lanes) store(out + d, load(out + d) * fall);
    for (; d < width; ++d) out[d] *= fall;
}

template <class Step>
RMR1_INLINE void by_rows(std::int64_t begin, std::int64_t end, const Step& step) {
    std::int64_t i = begin;
    for (; i + at_once <= end; i += at_once) step.template operator()<at_once>(i);
    if constexpr (at_once > 6) {
        for (; i + 6 <= end; i += 6) step.template operator()<6>(i);
    }
    if constexpr (at_once > 3) {
        for (; i + 3 <= end; i += 3) step.template operator()<3>(i);
    }
    for (; i < end; ++i) step.template operator()<1>(i);
}

// What is computed at a time: some queries with up to a tile of one sequence's keys.
struct Tile {
    Piece pieces[attention_tile / group];
    int count;
    std::int64_t first, begin, end;  // first key; queries
};

// `ahead` is the tile that comes next: it is fetched meanwhile.
static void attend(const KvCache& cache, const Queries& s, const Tile& tile, const Tile& ahead) {
    const std::int64_t width = cache.width;
    by_rows(tile.begin, tile.end, [&]<int R>(std::int64_t i) {
        for (int p = 0; p < tile.count; ++p) {
            scores<R>(s.q + i * width, width, tile.pieces[p].keys, cache.lanes,
                      i == tile.begin ? ahead.pieces[p].keys : nullptr,
                      s.weights + i * attention_tile + p * group);
        }
    });
    for (std::int64_t i = tile.begin; i < tile.end; ++i) {
        weigh(s, i, tile.first, tile.pieces, tile.count, width);
    }
    by_rows(tile.begin, tile.end, [&]<int R>(std::int64_t i) {
        mix_rows<R>(s.weights + i * attention_tile, tile.pieces,
                    i == tile.begin ? ahead.pieces : nullptr, tile.count, s.out + i * width, width);
    });
}

// Goes through the tiles of a task, one head and one part: first what all rows share, then what each
// sequence has of its own.
struct Walk {
    const AttentionShape& shape;
    const KvCache& cache;
    const AttentionTask& task;
    std::int64_t head, end;       // of the part
    std::int64_t key, limit;      // the next key, and where those of these rows end
    std::int64_t row, rows_end;   // the rows that see them
    std::int64_t own, next_own;   // where each sequence's own keys begin; the next one's first row

    bool more() {
        while (key >= limit) {
            if (next_own == task.end) return false;
            row = next_own;
            while (++next_own < task.end && shape.owner[next_own] == shape.owner[row]) {
            }
            rows_end = next_own;
            key = own;
            limit = shape.seen[rows_end - 1] < end ? shape.seen[rows_end - 1] : end;
        }
        return true;
    }

    // Tiny blocks make more pieces than a tile has columns for: then it takes several goes.
    void take(Tile* tile) {
        const std::int32_t* table = shape.tables + shape.owner[row] * shape.table_width;
        const std::int64_t heads = shape.heads / cache.heads, width = cache.width;
        tile->first = key;
        tile->begin = (row - task.begin) * heads;
        tile->end = (rows_end - task.begin) * heads;
        std::int64_t stop = (key / attention_tile + 1) * attention_tile;
        if (stop > limit) stop = limit;
        for (tile->count = 0; tile->count < attention_tile / group && key < stop; ++tile->count) {
            const std::int64_t block = key / cache.block_size, at = key - block * cache.block_size;
            std::int64_t size = cache.block_size - at;
            if (size > group - at % group) size = group - at % group;
            if (size > stop - key) size = stop - key;
            const std::int64_t place = table[block] * cache.heads + head;
            tile->pieces[tile->count] = {cache.keys + place * width * cache.lanes + at,
                                         cache.values + (place * cache.block_size + at) * width,
                                         size};
            key += size;
        }
        // For whoever fetches ahead by these: any address will do.
        for (int p = tile->count; p < attention_tile / group; ++p) {
            tile->pieces[p] = tile->pieces[0];
        }
    }
};

// Softmax so far of one query for a part of its keys: [D] weighted values, their largest score, the
// sum of their weights.
RMR1_INLINE float* partial(const AttentionShape& shape, float* scratch, std::int64_t width,
                           std::int64_t row, std::int64_t query_head, std::int64_t part) {
    return scratch + ((row * shape.heads + query_head) * shape.parts + part) * (width + 2);
}

RMR1_INLINE void finish(const float* mixed, float sum, std::int64_t width, float* out) {
    const float scale = sum > 0 || sum != sum ? 1.0f / sum : 0.0f;  // a query that sees nothing: 0
    for (std::int64_t d = 0; d < width; ++d) out[d] = mixed[d] * scale;
}

static void start(const AttentionShape& shape, const KvCache& cache, const float* q,
                  std::int64_t q_stride, float scale, const AttentionTask& task, std::int64_t head,
                  const Queries& s) {
    const std::int64_t width = cache.width, heads = shape.heads / cache.heads;
    for (std::int64_t row = task.begin; row < task.end; ++row) {
        for (std::int64_t h = 0; h < heads; ++h) {
            const std::int64_t i = (row - task.begin) * heads + h;
            const float* from = q + row * q_stride + (head * heads + h) * width;
            for (std::int64_t d = 0; d < width; ++d) s.q[i * width + d] = from[d] * scale;
            for (std::int64_t d = 0; d < width; ++d) s.out[i * width + d] = 0;
            s.peak[i] = -__builtin_inff();
            s.sum[i] = 0;
            s.seen[i] = shape.seen[row];
        }
    }
}

// One task, one head of keys, one part of the keys.
static void attend_part(const AttentionShape& shape, const KvCache& cache, const float* q,
                        std::int64_t q_stride, float* out, float scale, float* scratch,
                        const AttentionTask& task, std::int64_t head, std::int64_t part) {
    std::int64_t most = 0;  // the keys that some row of the task sees
    for (std::int64_t row = task.begin; row < task.end; ++row) {
        most = shape.seen[row] > most ? shape.seen[row] : most;
    }
    const std::int64_t first = part * attention_part, end = first + attention_part;
    if (part > 0 && first >= most) return;
    const std::int64_t width = cache.width, heads = shape.heads / cache.heads;
    const std::int64_t count = (task.end - task.begin) * heads;
    float* memory = static_cast<float*>(
        __builtin_alloca_with_align(4 * count * (2 * width + attention_tile + 4), 512));
    const Queries s{memory + count * attention_tile,
                    memory,
                    memory + count * (attention_tile + width),
                    memory + count * (attention_tile + 2 * width),
                    memory + count * (attention_tile + 2 * width + 1),
                    reinterpret_cast<std::int64_t*>(
                        memory + count * (attention_tile + 2 * width + 2))};
    start(shape, cache, q, q_stride, scale, task, head, s);

    std::int64_t own = task.shared < end ? task.shared : end;
    if (own < first) own = first;
    Walk walk{shape, cache, task, head, end, first, own, task.begin, task.end, own, task.begin};
    Tile tiles[2];
    bool there = walk.more();
    if (there) walk.take(&tiles[0]);
    for (int now = 0; there; now = 1 - now) {
        there = walk.more();
        if (there) walk.take(&tiles[1 - now]);
        attend(cache, s, tiles[now], there ? tiles[1 - now] : tiles[now]);
    }

    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t row = task.begin + i / heads, query_head = head * heads + i % heads;
        const float* mixed = s.out + i * width;
        if (most <= attention_part) {
            finish(mixed, s.sum[i], width, out + (row * shape.heads + query_head) * width);
            continue;
        }
        float* to = partial(shape, scratch, width, row, query_head, part);
        for (std::int64_t d = 0; d < width; ++d) to[d] = mixed[d];
        to[width] = s.peak[i];
        to[width + 1] = s.sum[i];
    }
}

// Rows whose keys came in several parts: one softmax over all of them, always in the same order.
static void merge_parts(const AttentionShape& shape, std::int64_t width, float* scratch, float* out,
                        const AttentionTask& task) {
    std::int64_t most = 0;
    for (std::int64_t row = task.begin; row < task.end; ++row) {
        most = shape.seen[row] > most ? shape.seen[row] : most;
    }
    const std::int64_t parts = (most + attention_part - 1) / attention_part;
    if (parts <= 1) return;
    for (std::int64_t row = task.begin; row < task.end; ++row) {
        for (std::int64_t h = 0; h < shape.heads; ++h) {
            float* all = partial(shape, scratch, width, row, h, 0);
            for (std::int64_t part = 1; part < parts; ++part) {
                const float* one = partial(shape, scratch, width, row, h, part);
                const float peak = one[width] > all[width] ? one[width] : all[width];
                if (one[width + 1] == 0) continue;  // this row sees none of these keys
                const float mine = max_of(exp(splat(all[width] - peak)));
                const float other = max_of(exp(splat(one[width] - peak)));
                for (std::int64_t d = 0; d < width; ++d) all[d] = all[d] * mine + one[d] * other;
                all[width] = peak;
                all[width + 1] = all[width + 1] * mine + one[width + 1] * other;
            }
            finish(all, all[width + 1], width, out + (row * shape.heads + h) * width);
        }
    }
}

}  // namespace rmr1::RMR1_ISA

#if RMR1_LAST_PASS
#include "parallel.h"

namespace rmr1 {

std::int64_t attention_scratch(const AttentionShape& shape, std::int64_t width) {
    return shape.parts > 1 ? shape.rows * shape.heads * shape.parts * (width + 2) : 0;
}

void paged_attention(const AttentionShape& shape, const KvCache& cache, const float* q,
                     std::int64_t q_stride, float* out, float scale, float* scratch, int threads) {
    const auto run = RMR1_CHOOSE(attend_part);
    const auto merge = RMR1_CHOOSE(merge_parts);
    const std::int64_t parts = shape.parts > 0 ? shape.parts : 1;
    parallel_tasks(shape.tasks_count * cache.heads * parts, threads, [&](std::int64_t unit) {
        const std::int64_t task = unit / (cache.heads * parts), part = unit % parts;
        run(shape, cache, q, q_stride, out, scale, scratch, shape.tasks[task],
            unit / parts % cache.heads, part);
    });
    if (parts == 1) return;
    parallel_tasks(shape.tasks_count, threads, [&](std::int64_t task) {
        merge(shape, cache.width, scratch, out, shape.tasks[task]);
    });
}

}  // namespace rmr1
#endif
