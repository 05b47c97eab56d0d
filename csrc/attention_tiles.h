// What the attention of training computes with: tiles of rows, products of a tile with keys and values,
// and which keys a row sees. Included once per instruction set (see each_isa.h), so without a guard.

// As in linear.cpp the lanes of a vector are rows: here queries, those of all heads that share a
// key side by side. Keys and values are broadcast from where they lie, so softmax runs over vectors
// and never across one. Rows are taken in blocks, with keys in blocks of `keys_at_once`.

namespace rmr1::RMR1_ISA {

constexpr int vectors = 3;                         // of rows in a tile
constexpr std::int64_t tile = vectors * lanes;     // rows
constexpr std::int64_t block = 96;                 // rows, whole tiles on every instruction set
constexpr std::int64_t tiles = block / tile;
constexpr std::int64_t keys_at_once = 48;
constexpr std::int64_t depth = 64;                 // of a sum; a sum of sums rounds less
constexpr int at_once = RMR1_LANES == 16 ? 8 : 4;  // broadcast values of an inner loop
constexpr int outer_rows = RMR1_LANES == 16 ? 6 : 3, outer_vectors = 4;
static_assert(block % tile == 0 && keys_at_once % at_once == 0 && keys_at_once % outer_rows == 0);

// --- Products ------------------------------------------------------------------------------------

// c[r] = a[r] . x: R rows of `a` with a tile of x, [width][tile]; added to c after the `first` part
// of the width.
template <int R>
RMR1_INLINE void dots(const float* a, std::int64_t stride, const float* x, std::int64_t width,
                      bool first, float* c) {
    vf sums[R][vectors] = {};
    for (std::int64_t d = 0; d < width; ++d) {
        vf columns[vectors];
        for (int v = 0; v < vectors; ++v) columns[v] = load(x + d * tile + v * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const vf one = splat(a[r * stride + d]);
            for (int v = 0; v < vectors; ++v) sums[r][v] += one * columns[v];
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < vectors; ++v) {
            float* to = c + r * tile + v * lanes;
            store(to, first ? sums[r][v] : load(to) + sums[r][v]);
        }
    }
}

static void all_dots(const float* a, std::int64_t stride, const float* x, std::int64_t width,
                     std::int64_t keys, float* c) {
    for (std::int64_t d = 0; d < width; d += depth) {
        const std::int64_t some = width - d < depth ? width - d : depth;
        const float *from = a + d, *columns = x + d * tile;
        std::int64_t key = 0;
        for (; key + at_once <= keys; key += at_once) {
            dots<at_once>(from + key * stride, stride, columns, some, d == 0, c + key * tile);
        }
        for (; key < keys; ++key) {
            dots<1>(from + key * stride, stride, columns, some, d == 0, c + key * tile);
        }
    }
}

// o[d] += sum over keys of b[key][d] * p[key], for a tile: o [width][tile], p [keys][tile].
static void mix(const float* b, std::int64_t stride, const float* p, std::int64_t keys,
                std::int64_t width, float* o) {
    for (std::int64_t d = 0; d < width; d += at_once) {
        vf sums[at_once][vectors];
        for (int r = 0; r < at_once; ++r) {
            for (int v = 0; v < vectors; ++v) sums[r][v] = load(o + (d + r) * tile + v * lanes);
        }
        for (std::int64_t key = 0; key < keys; ++key) {
            vf columns[vectors];
            for (int v = 0; v < vectors; ++v) columns[v] = load(p + key * tile + v * lanes);
#pragma GCC unroll 8
            for (int r = 0; r < at_once; ++r) {
                const vf one = splat(b[key * stride + d + r]);
                for (int v = 0; v < vectors; ++v) sums[r][v] += one * columns[v];
            }
        }
        for (int r = 0; r < at_once; ++r) {
            for (int v = 0; v < vectors; ++v) store(o + (d + r) * tile + v * lanes, sums[r][v]);
        }
    }
}

// to[r][d] += sum over rows of p[key r][row] * x[row][d], for some vectors of d.
template <int R, int W>
RMR1_INLINE void outer(const float* p, const float* x, std::int64_t rows, std::int64_t width,
                       float* to) {
    vf sums[R][W];
    for (int r = 0; r < R; ++r) {
        for (int w = 0; w < W; ++w) sums[r][w] = load(to + r * width + w * lanes);
    }
    for (std::int64_t t = 0; t * tile < rows; ++t) {
        const float* own = p + t * keys_at_once * tile;
        const std::int64_t left = rows - t * tile, count = left < tile ? left : tile;
        for (std::int64_t i = 0; i < count; ++i) {
            vf columns[W];
            for (int w = 0; w < W; ++w) columns[w] = load(x + (t * tile + i) * width + w * lanes);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const vf one = splat(own[r * tile + i]);
                for (int w = 0; w < W; ++w) sums[r][w] += one * columns[w];
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int w = 0; w < W; ++w) store(to + r * width + w * lanes, sums[r][w]);
    }
}

template <int R>
static void outer_keys(const float* p, const float* x, std::int64_t rows, std::int64_t width,
                       float* to) {
    std::int64_t d = 0;
    for (; d + outer_vectors * lanes <= width; d += outer_vectors * lanes) {
        outer<R, outer_vectors>(p, x + d, rows, width, to + d);
    }
    for (; d + lanes <= width; d += lanes) outer<R, 1>(p, x + d, rows, width, to + d);
    for (; d < width; ++d) {  // heads of 8 on AVX-512
        for (int r = 0; r < R; ++r) {
            for (std::int64_t i = 0; i < rows; ++i) {
                const float weight = p[(i / tile) * keys_at_once * tile + r * tile + i % tile];
                to[r * width + d] = __builtin_fmaf(weight, x[i * width + d], to[r * width + d]);
            }
        }
    }
}

static void all_outer(const float* p, const float* x, std::int64_t rows, std::int64_t keys,
                      std::int64_t width, float* to) {
    std::int64_t key = 0;
    for (; key + outer_rows <= keys; key += outer_rows) {
        outer_keys<outer_rows>(p + key * tile, x, rows, width, to + key * width);
    }
    for (; key < keys; ++key) outer_keys<1>(p + key * tile, x, rows, width, to + key * width);
}

// --- Rows ----------------------------------------------------------------------------------------

RMR1_INLINE std::int64_t token_of(const AttentionRows& b, std::int64_t row) {
    return b.segment->begin + (b.first + row) / b.group;
}
RMR1_INLINE std::int64_t head_of(const AttentionRows& b, std::int64_t row) {
    return b.head * b.group + (b.first + row) % b.group;
}

// [T, N, D] -> tiles [width][tile], times `scale`; rows that are not there are zero.
static void pack(const AttentionRows& b, const float* x, std::int64_t stride, std::int64_t width,
                 float scale, float* to) {
    for (std::int64_t row = 0; row < block; ++row) {
        float* column = to + row / tile * tile * width + row % tile;
        if (row >= b.rows) {
            if (row / tile * tile < b.rows) {
                for (std::int64_t d = 0; d < width; ++d) column[d * tile] = 0;
            }
            continue;
        }
        const float* from = x + token_of(b, row) * stride + head_of(b, row) * width;
        for (std::int64_t d = 0; d < width; ++d) column[d * tile] = from[d] * scale;
    }
}

static void unpack(const AttentionRows& b, const float* tiles_, std::int64_t heads, std::int64_t width,
                   const float* factors, float factor, float* x) {
    for (std::int64_t row = 0; row < b.rows; ++row) {
        const float* column = tiles_ + row / tile * tile * width + row % tile;
        float* to = x + (token_of(b, row) * heads + head_of(b, row)) * width;
        const float by = factors ? factors[row] : factor;
        for (std::int64_t d = 0; d < width; ++d) to[d] = column[d * tile] * by;
    }
}

// The keys that a block sees: a run of its prefix, then one of its own segment, up to the last row's.
struct KeyRun {
    std::int64_t begin, end;
    bool causal;
};

RMR1_INLINE KeyRun run_of(const AttentionRows& b, int part) {
    if (part == 0) return {b.segment->prefix_begin, b.segment->prefix_end, false};
    return {b.segment->begin, token_of(b, b.rows - 1) + 1, true};
}

// Scores of keys that a row does not see become -inf.
RMR1_INLINE void hide(const AttentionRows& b, std::int64_t t, std::int64_t key, std::int64_t keys,
                      float* s) {
    const std::int64_t begin = t * tile;
    if (key + keys - 1 <= token_of(b, begin)) return;
    for (std::int64_t i = 0; i < tile; ++i) {
        const std::int64_t row = begin + i < b.rows ? begin + i : b.rows - 1;
        for (std::int64_t j = token_of(b, row) + 1 - key; j < keys; ++j) {
            if (j >= 0) s[j * tile + i] = -__builtin_inff();
        }
    }
}

}  // namespace rmr1::RMR1_ISA
