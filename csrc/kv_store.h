// Keys and values of new tokens into the paged cache; rmr1/kernels/kv_store.py defines the op.
#pragma once

#include <cstdint>

namespace rmr1 {

// One layer's cache. keys [blocks, K, D, lanes]: `lanes` is the block size rounded up to 16, so that
// 16 tokens of one dimension are one vector; values [blocks, K, block_size, D].
struct KvCache {
    float *keys, *values;
    std::int64_t heads, width, block_size, lanes;
};

// key, value [T, K, D] with tokens `stride` floats apart go to `slots` [T], each block * block_size +
// offset; a token with a negative slot is left out.
void kv_store(const KvCache& cache, const float* key, std::int64_t key_stride, const float* value,
              std::int64_t value_stride, const std::int64_t* slots, std::int64_t tokens, int threads);

}  // namespace rmr1
