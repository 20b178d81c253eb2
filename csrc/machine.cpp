#include "machine.hpp"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <unordered_map>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
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

std::mutex& pool_mutex() {
  static std::mutex m;
  return m;
}

#if defined(__unix__) || defined(__APPLE__)
// Hold the pool's lock while forking, so that no other thread does in the child; and remember there
// that the child has no OpenMP threads.
const int registered = pthread_atfork([] { pool_mutex().lock(); },
                                      [] { pool_mutex().unlock(); },
                                      [] {
                                        pool_mutex().unlock();
                                        forked = true;
                                      });
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

namespace {

constexpr std::size_t huge_page = std::size_t(2) << 20;

struct Pool {
  std::multimap<std::size_t, void*> kept;  // by size
  std::unordered_map<void*, std::size_t> lent;
  std::size_t bytes = 0;
  std::size_t limit = std::size_t(256) << 20;
};

Pool& pool() {
  // Never destroyed: arrays may outlive the interpreter's last module.
  static Pool* p = new Pool;
  return *p;
}

// glibc returns freed memory to the system above a threshold, which is twice the largest block freed
// so far, of up to 32 MiB. Free such a block now, as a program with large arrays does sooner or later.
// Otherwise gradients that the optimizer drops in every step would come back as fresh pages, which
// the system has to clear; benchmarks/network_step.py --profile counts these page faults. No page of
// the block is touched. Thresholds set by hand remain, and other allocators are not affected.
void settle_allocator() {
#ifdef __GLIBC__
  void* volatile block = std::malloc((std::size_t(32) << 20) - (std::size_t(64) << 10));
  std::free(block);
#endif
}

void* fresh(std::size_t bytes) {
  static const bool settled = (settle_allocator(), true);
  (void)settled;
  const std::align_val_t alignment{bytes >= huge_page ? huge_page : 64};
  void* p = ::operator new(bytes, alignment);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= huge_page) madvise(p, bytes, MADV_HUGEPAGE);  // may fail without harm
#endif
  return p;
}

void discard(void* p, std::size_t bytes) {
  ::operator delete(p, std::align_val_t{bytes >= huge_page ? huge_page : 64});
}

void trim(Pool& p, std::size_t limit) {  // largest first: few blocks, many bytes
  while (p.bytes > limit) {
    auto last = std::prev(p.kept.end());
    p.bytes -= last->first;
    discard(last->second, last->first);
    p.kept.erase(last);
  }
}

}  // namespace

void* take_block(std::size_t bytes) {
  const std::size_t unit = bytes >= huge_page ? huge_page : 4096;
  const std::size_t size = (bytes + unit - 1) / unit * unit;
  std::lock_guard<std::mutex> lock(pool_mutex());
  Pool& p = pool();
  void* block;
  std::size_t actual = size;
  // A block up to an eighth larger will do.
  auto found = p.kept.lower_bound(size);
  if (found != p.kept.end() && found->first <= size + size / 8) {
    actual = found->first;
    block = found->second;
    p.bytes -= actual;
    p.kept.erase(found);
  } else {
    block = fresh(size);
  }
  p.lent.emplace(block, actual);
  return block;
}

void give_block(void* block) {
  std::lock_guard<std::mutex> lock(pool_mutex());
  Pool& p = pool();
  const auto entry = p.lent.find(block);
  const std::size_t size = entry->second;
  p.lent.erase(entry);
  if (size > p.limit) {
    discard(block, size);
    return;
  }
  p.kept.emplace(size, block);
  p.bytes += size;
  trim(p, p.limit);
}

void release_blocks() {
  std::lock_guard<std::mutex> lock(pool_mutex());
  trim(pool(), 0);
}

std::size_t kept_bytes() {
  std::lock_guard<std::mutex> lock(pool_mutex());
  return pool().bytes;
}

void keep_at_most(std::size_t bytes) {
  std::lock_guard<std::mutex> lock(pool_mutex());
  pool().limit = bytes;
  trim(pool(), bytes);
}

}  // namespace bn
