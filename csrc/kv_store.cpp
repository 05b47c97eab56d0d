#include "kv_store.h"

#include "parallel.h"

namespace rmr1 {

// Plain copies, bound by the cache's scattered lines: nothing here for vectors to do.
void kv_store(const KvCache& cache, const float* key, std::int64_t key_stride, const float* value,
              std::int64_t value_stride, const std::int64_t* slots, std::int64_t tokens,
              int threads) {
    const std::int64_t heads = cache.heads, width = cache.width;
    const auto store_token = [&](std::int64_t token) {
        if (slots[token] < 0) return;
        const std::int64_t block = slots[token] / cache.block_size;
        const std::int64_t offset = slots[token] % cache.block_size;
        for (std::int64_t head = 0; head < heads; ++head) {
            const float* k = key + token * key_stride + head * width;
            const float* v = value + token * value_stride + head * width;
            float* keys = cache.keys + (block * heads + head) * width * cache.lanes + offset;
            float* values = cache.values + ((block * heads + head) * cache.block_size + offset) * width;
            for (std::int64_t d = 0; d < width; ++d) keys[d * cache.lanes] = k[d];
            for (std::int64_t d = 0; d < width; ++d) values[d] = v[d];
        }
    };
    parallel_for(tokens, 2048 / (heads * width + 1) + 1, threads,
                 [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t token = begin; token < end; ++token) store_token(token);
                 });
}

}  // namespace rmr1
