// What the machine offers: threads, cache, memory for outputs.
#pragma once

#include <chrono>

#include "kernels.hpp"

namespace bn {

int usable_threads();      // 1 in a forked child, whose OpenMP threads did not survive the fork
// How long the calling thread waited for the others after its own part. A thread whose core belongs to
// another process just then comes a scheduler's tick late, in every call; so after such a wait,
// usable_threads() is 1 for 30 times as long.
void waited_for_threads(std::chrono::steady_clock::duration);
index last_level_cache();  // bytes
void assume_last_level_cache(index bytes);  // for tests; negative: what the machine has

// From the first call on, freed memory stays with the process: the first touch of a new page costs
// several times what the kernels do to it.
void keep_freed_memory();
// Of a large new output: have its pages be huge, where the system has such.
void prepare_output(void* p, std::size_t bytes);

}  // namespace bn
