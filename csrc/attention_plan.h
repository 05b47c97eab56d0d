// Which queries are attended together: done once a step, for all layers.
#pragma once

#include <vector>

#include "paged_attention.h"

namespace rmr1 {

// The sequences of a step: tables [S, table_width], contexts [S] (tokens, the queries included),
// starts [S + 1] (the rows of queries).
struct Sequences {
    const std::int32_t *tables, *contexts, *starts;
    std::int64_t count, table_width, block_size;
};

class AttentionPlan {
public:
    // `heads` of queries, `kv_heads` of keys and values; `threads` that must not stand idle.
    void make(const Sequences& sequences, std::int64_t heads, std::int64_t kv_heads, int threads);
    const AttentionShape& shape() const { return shape_; }

private:
    void add_chunk(std::int64_t begin, std::int64_t end, std::int64_t most);
    void add_decoding(const Sequences& sequences, std::int64_t first, std::int64_t last,
                      std::int64_t most);

    AttentionShape shape_{};
    std::vector<AttentionTask> tasks_;
    std::vector<std::int32_t> owner_, seen_;
};

}  // namespace rmr1
