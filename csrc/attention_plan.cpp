#include "attention_plan.h"

#include <algorithm>

namespace rmr1 {
namespace {

std::int64_t whole_tiles(std::int64_t keys) { return keys / attention_tile * attention_tile; }

// How many first keys two sequences have in common, by the blocks of their tables.
std::int64_t common_keys(const Sequences& s, std::int64_t a, std::int64_t b) {
    const std::int32_t *left = s.tables + a * s.table_width, *right = s.tables + b * s.table_width;
    const std::int64_t keys = std::min(s.contexts[a], s.contexts[b]);
    const std::int64_t blocks = keys / s.block_size;
    std::int64_t same = 0;
    while (same < blocks && left[same] == right[same]) ++same;
    return same * s.block_size;
}

}  // namespace

void AttentionPlan::make(const Sequences& s, std::int64_t heads, std::int64_t kv_heads,
                         int threads) {
    tasks_.clear();
    const std::int64_t rows = s.starts[s.count];
    owner_.assign(rows, 0);
    seen_.assign(rows, 0);
    std::int64_t longest = 0;
    for (std::int64_t i = 0; i < s.count; ++i) {
        const std::int64_t queries = s.starts[i + 1] - s.starts[i];
        longest = std::max<std::int64_t>(longest, s.contexts[i]);
        for (std::int64_t j = 0; j < queries; ++j) {
            owner_[s.starts[i] + j] = static_cast<std::int32_t>(i);
            const std::int64_t sees = s.contexts[i] - queries + j + 1;
            seen_[s.starts[i] + j] = static_cast<std::int32_t>(std::max<std::int64_t>(sees, 0));
        }
    }
    // Rows of a task: as many as its buffers hold, but enough tasks for all threads to end together.
    const std::int64_t wanted = (4 * threads + kv_heads - 1) / kv_heads;
    const std::int64_t most = std::clamp<std::int64_t>(
        rows / std::max<std::int64_t>(1, wanted), 1,
        std::max<std::int64_t>(1, attention_vectors / (heads / kv_heads)));
    for (std::int64_t i = 0; i < s.count;) {
        if (s.starts[i + 1] - s.starts[i] != 1) {
            add_chunk(s.starts[i], s.starts[i + 1], most);
            ++i;
            continue;
        }
        std::int64_t last = i + 1;
        while (last < s.count && s.starts[last + 1] - s.starts[last] == 1) ++last;
        add_decoding(s, i, last, most);
        i = last;
    }
    shape_ = {s.tables,      s.table_width, owner_.data(),
              seen_.data(),  rows,          heads,
              tasks_.data(), static_cast<std::int64_t>(tasks_.size()),
              (longest + attention_part - 1) / attention_part};
}

// The queries of one sequence: each sees one key more than the one before it.
void AttentionPlan::add_chunk(std::int64_t begin, std::int64_t end, std::int64_t most) {
    for (std::int64_t row = begin; row < end; row += most) {
        tasks_.push_back({row, std::min(end, row + most), whole_tiles(seen_[row])});
    }
}

// Sequences with one query each: neighbours that share a prompt read its keys together.
void AttentionPlan::add_decoding(const Sequences& s, std::int64_t first, std::int64_t last,
                                 std::int64_t most) {
    const auto with_next = [&](std::int64_t i) {
        return i + 1 < last ? whole_tiles(common_keys(s, i, i + 1)) : 0;
    };
    for (std::int64_t i = first; i < last;) {
        // Alone, where the next two have more in common than this one with the next: a prefix that
        // is common to all prompts must not keep the samples of one prompt apart.
        std::int64_t shared = with_next(i), end = i + 1;
        if (shared == 0 || shared < with_next(i + 1)) {
            tasks_.push_back({s.starts[i], s.starts[i] + 1, whole_tiles(s.contexts[i])});
            ++i;
            continue;
        }
        while (end < last && end - i < most && with_next(end - 1) >= shared) ++end;
        tasks_.push_back({s.starts[i], s.starts[end - 1] + 1, shared});
        i = end;
    }
}

}  // namespace rmr1
