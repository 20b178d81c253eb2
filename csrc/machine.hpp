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

// Memory for outputs. Blocks that come back are kept (up to a limit) and handed out again, because
// the first touch of fresh pages costs several times what the kernels do to them.
void* take_block(std::size_t bytes);
void give_block(void* block);
void release_blocks();           // free what is kept
std::size_t kept_bytes();
void keep_at_most(std::size_t bytes);

}  // namespace bn
