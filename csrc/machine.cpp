#include "machine.hpp"

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace bn {

// ---- instruction sets ---------------------------------------------------------------------------

namespace baseline { extern const InstructionSet table; }
#ifdef BN_HAVE_AVX2
namespace avx2 { extern const InstructionSet table; }
#endif
#ifdef BN_HAVE_AVX512
namespace avx512 { extern const InstructionSet table; }
#endif

namespace {

std::vector<const InstructionSet*> runnable() {
  std::vector<const InstructionSet*> sets = {&baseline::table};
#if defined(BN_HAVE_AVX2)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
#if !defined(__clang__)
      && __builtin_cpu_supports("f16c")  // every machine with AVX2 has it; Clang may not know it
#endif
  )
    sets.push_back(&avx2::table);
#endif
#if defined(BN_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    sets.push_back(&avx512::table);
#endif
  return sets;
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{runnable().back()};
  return set;
}

}  // namespace

const InstructionSet& current_instruction_set() { return *chosen().load(); }

std::string instruction_set() { return current_instruction_set().name; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : runnable()) names.emplace_back(set->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  std::string known;
  for (const InstructionSet* set : runnable()) {
    if (name == set->name) {
      chosen().store(set);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(set->name);
  }
  throw BadCall("instruction set must be one of those this machine runs (" + known + "), got '" +
                name + "'");
}

// ---- threads ------------------------------------------------------------------------------------

namespace {

std::atomic<bool> forked{false};
std::atomic<std::chrono::steady_clock::rep> alone_until{0};

#if defined(__unix__) || defined(__APPLE__)
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

int threads() {
#ifdef _OPENMP
  if (!forked && !omp_in_parallel()) return omp_get_max_threads();
#endif
  return 1;
}

int usable_threads() {
  const auto until = alone_until.load(std::memory_order_relaxed);
  if (until && std::chrono::steady_clock::now().time_since_epoch().count() < until) return 1;
  return threads();
}

void waited_for_threads(std::chrono::steady_clock::duration wait) {
  if (wait < std::chrono::milliseconds(2)) return;  // longer than any task
  alone_until = (std::chrono::steady_clock::now() + 30 * wait).time_since_epoch().count();
}

// ---- cache --------------------------------------------------------------------------------------

namespace {
std::atomic<index> assumed_cache{-1};
}

void assume_last_level_cache(index bytes) { assumed_cache = bytes; }

index last_level_cache() {
  if (assumed_cache >= 0) return assumed_cache;
  static const index bytes = [] {
    // The C library's sysconf was seen to answer with ten times the truth on a virtual machine;
    // the kernel's own table is what lscpu reads.
    index largest = 0;
    for (int level = 0; level < 5; ++level) {
      char path[96];
      std::snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%d/size", level);
      if (std::FILE* f = std::fopen(path, "r")) {
        long long n = 0;
        char unit = 'K';
        if (std::fscanf(f, "%lld%c", &n, &unit) >= 1) {
          const index scaled = index(n) * (unit == 'M' ? 1 << 20 : unit == 'K' ? 1 << 10 : 1);
          if (scaled > largest) largest = scaled;
        }
        std::fclose(f);
      }
    }
    return largest > 0 ? largest : index(32) << 20;
  }();
  return bytes;
}

// ---- memory for outputs -------------------------------------------------------------------------

// glibc returns freed memory to the system early, and the outputs of a network, or the gradients that
// an optimizer drops in every step, come back as pages that the system has to clear. Which blocks it
// keeps depends on what a program happens to have freed. Choose the highest threshold that it would
// choose by itself, and let 256 MiB stay; but leave alone what somebody has set.
void keep_freed_memory() {
#ifdef __GLIBC__
  static const bool once = [] {
    const char* tunables = std::getenv("GLIBC_TUNABLES");
    if (std::getenv("MALLOC_MMAP_THRESHOLD_") || std::getenv("MALLOC_TRIM_THRESHOLD_") ||
        (tunables && std::strstr(tunables, "glibc.malloc.")))
      return false;
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 256 << 20);
    return true;
  }();
  (void)once;
#endif
}

void prepare_output(void* p, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t huge_page = std::uintptr_t(2) << 20;
  const auto at = reinterpret_cast<std::uintptr_t>(p);
  const std::uintptr_t begin = (at + huge_page - 1) / huge_page * huge_page;
  const std::uintptr_t end = (at + bytes) / huge_page * huge_page;
  if (begin < end)  // may fail without harm
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace bn
