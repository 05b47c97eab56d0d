// Work shared out over threads with OpenMP: the pool is the one that torch's own operators use, so
// the two never fight for the cores.
#pragma once

#include <cstdint>

namespace rmr1 {

// Calls work(first, last) on at most `threads` runs that cover 0..count-1, each at least `grain`
// long. `work` must not throw.
template <class Work>
void parallel_for(std::int64_t count, std::int64_t grain, int threads, const Work& work) {
    const std::int64_t most = grain > 0 ? (count + grain - 1) / grain : count;
    const std::int64_t parts = most < threads ? most : threads;
    if (parts <= 1) {
        if (count > 0) work(std::int64_t{0}, count);
        return;
    }
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (std::int64_t part = 0; part < parts; ++part) {
        work(part * count / parts, (part + 1) * count / parts);
    }
}

// Calls work(task) for 0..count-1; whoever is free takes the next one, so that tasks of different
// sizes, or a core that others use too, hold nobody up. `work` must not throw.
template <class Work>
void parallel_tasks(std::int64_t count, int threads, const Work& work) {
    if (threads <= 1 || count <= 1) {
        for (std::int64_t task = 0; task < count; ++task) work(task);
        return;
    }
    const std::int64_t most = count < threads ? count : threads;
#pragma omp parallel for num_threads(static_cast<int>(most)) schedule(dynamic, 1)
    for (std::int64_t task = 0; task < count; ++task) work(task);
}

}  // namespace rmr1
