#include "group_advantage.h"

#include <algorithm>
#include <cmath>

namespace rmr1 {
void group_advantages(const float* rewards, const std::int64_t* offsets, std::int64_t groups,
                      bool divide_by_std, bool leave_one_out, const std::int64_t* token_offsets,
                      float* advantages, float eps) {
    for (std::int64_t group = 0; group < groups; ++group) {
        const std::int64_t begin = offsets[group], end = offsets[group + 1];
        const double count = static_cast<double>(end - begin);
        double mean = 0, squares = 0;
        bool equal = true;
        for (std::int64_t i = begin; i < end; ++i) {
            mean += rewards[i] / count;
            equal = equal && rewards[i] == rewards[begin];
        }
        for (std::int64_t i = begin; i < end; ++i) {
            squares += (rewards[i] - mean) * (rewards[i] - mean);
        }
        // A group of equal rewards (or of one) says nothing; rounding must not make it a direction.
        double factor = equal ? 0.0 : 1.0;
        if (!equal && leave_one_out) factor *= count / (count - 1);
        if (!equal && divide_by_std) factor /= std::sqrt(squares / (count - 1)) + eps;
        for (std::int64_t i = begin; i < end; ++i) {
            const float advantage =
                equal ? 0.0f : static_cast<float>((rewards[i] - mean) * factor);
            if (token_offsets) {
                std::fill(advantages + token_offsets[i], advantages + token_offsets[i + 1], advantage);
            } else {
                advantages[i] = advantage;
            }
        }
    }
}

}  // namespace rmr1
