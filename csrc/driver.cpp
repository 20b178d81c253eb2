// The kernels of kernels.hpp on whole arrays: partition, threads, and every decision that touches
// accuracy. The loops over elements are in bodies.hpp.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <memory>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "half.hpp"
#include "kernels.hpp"
#include "layout.hpp"
#include "machine.hpp"

namespace bn {
namespace {

constexpr index rows_chunk = 16384;    // values of one channel in a chunk, channels apart
constexpr index columns_chunk = 32768; // values of all channels in a chunk, channels side by side
constexpr index serial_below = 32768;  // values; waking a thread costs more than this many
constexpr index exact_below = 8192;    // values; float32 runs save less than a microsecond then
constexpr index few_values = 256;      // of a channel; rounding errors of fewer do not average out
constexpr index line = 64;             // bytes in a cache line
constexpr index near_bytes = 1 << 18;  // as much of what a call reads is in a core's own cache, if called again

index ceil_div(index a, index b) { return (a + b - 1) / b; }

// A share of the array that is cut by size alone, so that no sum depends on the number of threads.
struct Partition {
  index outer_step, inner_step, outer_chunks, inner_chunks, channel_step, channel_blocks;

  Partition(const Layout& l, index channel_step_) : channel_step(channel_step_) {
    // Of columns, so few rows that small arrays have work for several threads, and so many that partial
    // sums, which threads have to fetch from one another, remain few.
    const index least = std::max<index>(16, std::min<index>(64, ceil_div(l.inners, 2)));
    const index of_columns = std::max({least, columns_chunk / l.channels, l.inners / 128});
    const index target = l.rows ? rows_chunk : std::min<index>(4096, of_columns);
    inner_step = l.inners > target ? target : l.inners;
    outer_step = inner_step < l.inners ? 1 : std::max<index>(1, target / l.inners);
    outer_chunks = ceil_div(l.outers, outer_step);
    inner_chunks = ceil_div(l.inners, inner_step);
    channel_blocks = ceil_div(l.channels, channel_step);
  }
  index chunks() const { return outer_chunks * inner_chunks; }

  Block block(const Layout& l, index chunk, index channel_block) const {
    const index o = chunk / inner_chunks * outer_step, i = chunk % inner_chunks * inner_step;
    const index c = channel_block * channel_step;
    return {o, std::min(l.outers, o + outer_step), i, std::min(l.inners, i + inner_step),
            c, std::min(l.channels, c + channel_step)};
  }
};

double rounded_to(double v, DType t) {
  switch (t) {
    case DType::f32: return double(float(v));
    case DType::f64: return v;
    case DType::f16: return widen(to_float16(float(v)));
    case DType::bf16: return widen(to_bfloat16(float(v)));
  }
  return v;
}

// Beyond this range float32 coefficients lose digits or overflow; the last step is float64 then.
// In loops over channels, conditions are added up in integers as wide as float64, without branches:
// then they are vectorized.
index fits_float32(double v) {
  const double a = std::fabs(v);
  return index(a == 0) | (index(a > 1e-30) & index(a < 1e30)) |
         index(!(a - a == 0));  // or not finite in either
}

// Each thread has a stretch of neighbouring tasks: dealt out one by one, the cores would take turns on
// neighbouring memory. A thread that is done early, another being held up, helps out; but the call ends
// with the last thread, even if that one found nothing left to do. `backwards`:
// from the end of each stretch, where an earlier pass over the same tasks ended and the cache still
// holds what it read.
template <class Body>
void parallel(index tasks, index values, bool backwards, const Body& body) {
  const int wanted = values < serial_below ? 1 : int(std::min<index>(tasks, usable_threads()));
  if (wanted <= 1) {
    for (index t = 0; t < tasks; ++t) body(backwards ? tasks - 1 - t : t);
    return;
  }
#ifdef _OPENMP
  struct alignas(line) Stretch {
    std::atomic<index> next;
    index begin, end;
  };
  std::unique_ptr<Stretch[]> stretches(new Stretch[std::size_t(wanted)]);
  for (int k = 0; k < wanted; ++k) {
    stretches[k].begin = tasks * k / wanted;
    stretches[k].next.store(stretches[k].begin, std::memory_order_relaxed);
    stretches[k].end = tasks * (k + 1) / wanted;
  }
  std::chrono::steady_clock::time_point done;
#pragma omp parallel num_threads(wanted)
  {
    const int first = omp_get_thread_num();
    for (int k = 0; k < wanted; ++k) {
      Stretch& s = stretches[(first + k) % wanted];
      index t;
      while ((t = s.next.fetch_add(1, std::memory_order_relaxed)) < s.end)
        body(backwards ? s.begin + s.end - 1 - t : t);
    }
    if (first == 0) done = std::chrono::steady_clock::now();
  }
  waited_for_threads(std::chrono::steady_clock::now() - done);
#endif
}

// One call on its way through the kernels.
class Call {
 public:
  enum : int { X, Grad, Residual, Out, OutResidual, Weights, operands };

  Call(const Array& x, const Array& grad, const Array& residual, const Array& weights,
       const Array& out, const Array& out_residual, int channel_axis, const Epilogue& epilogue)
      : isa_(current_instruction_set()) {
    const Array* given[operands] = {&x, &grad, &residual, &out, &out_residual, &weights};
    Operand seen[operands];
    if (!fit(given, operands, channel_axis, &layout_, seen)) {
      const Array* packed[operands];
      for (int k = 0; k < operands; ++k) {
        const bool writes = k == Out || k == OutResidual;
        // The channel axis of the weights has stride 0; packing keeps the shape, so it is filled.
        packed_[k] = std::make_unique<Packed>(*given[k], !writes);
        packed[k] = &packed_[k]->array();
      }
      if (!fit(packed, operands, channel_axis, &layout_, seen))
        throw BadCall("internal: a contiguous array fits no layout");
    }
    job_.rows = layout_.rows;
    job_.dtype = x.dtype;
    job_.epilogue = epilogue;
    job_.x = seen[X];
    job_.grad = seen[Grad];
    job_.residual = seen[Residual];
    job_.weights = seen[Weights];
    job_.out = seen[Out];
    job_.out_residual = seen[OutResidual];
    job_.dense = !weights;
    for (int k = 0; k < Weights; ++k) {
      if (!seen[k].data) continue;
      const index gap = layout_.rows ? seen[k].channel - layout_.inners
                                     : seen[k].inner - layout_.channels;
      job_.dense = job_.dense && gap == 0;
    }
    values_ = layout_.per_channel() * layout_.channels;
    inputs_ = 1 + (grad ? 1 : 0) + (residual ? 1 : 0);
    const index touched = inputs_ + (out ? 1 : 0) + (out_residual ? 1 : 0);
    const bool pieces = job_.dense || (layout_.rows ? layout_.inners * size_of(x.dtype) >= 1024
                                                    : layout_.channels * size_of(x.dtype) >= line);
    job_.stream = values_ * size_of(x.dtype) * touched > last_level_cache() && pieces;
    job_.far = values_ * size_of(x.dtype) * inputs_ > near_bytes;

    const index c = layout_.channels;
    wide_.assign(std::size_t(c), 0);
    storage_.reset(new double[std::size_t(c) * 8]);  // each array is written before it is read
    shift_ = storage_.get();
    scale_ = shift_ + c;
    offset_ = scale_ + c;
    tilt_ = offset_ + c;
    level_ = tilt_ + c;
    first_ = level_ + c;
    second_ = first_ + c;
    inv_std_ = second_ + c;
    job_.shift = shift_;
    job_.scale = scale_;
    job_.offset = offset_;
    job_.tilt = tilt_;
    job_.level = level_;
  }

  index channels() const { return layout_.channels; }

  // And three positions that a channel's center is taken from.
  Count count() {
    const index n = layout_.per_channel();
    if (!job_.weights.data) {
      const index at[3] = {0, n / 2, n - 1};
      for (int k = 0; k < 3; ++k) probe(k, at[k]);
      return {double(n), double(n - 1)};
    }
    double total = 0, pairs = 0;  // Σw, and Σ w_i w_j over pairs: nothing cancels
    index positive = 0;
    each_weight([&](double w, index) {
      pairs += w * total;
      total += w;
      positive += w > 0;
    });
    double share = 0, dof = positive > 1 ? 2 * pairs / total : 0;
    const bool scaled = positive > 1 && !(pairs > 1e-290 && pairs < 1e290);
    index seen = 0;
    const index at[3] = {0, positive / 2, positive - 1};
    if (scaled) dof = 0;  // products of weights leave float64; their shares do not
    each_weight([&](double w, index flat) {
      if (!(w > 0)) return;
      if (scaled) {
        dof += 2 * w * share;
        share += w / total;
      }
      for (int k = 0; k < 3; ++k)
        if (at[k] == seen) probe(k, flat);
      ++seen;
    });
    return {total, dof};
  }

  void moments_and_maybe_normalize(double count, double* mean, double* mean_low, double* m2,
                                   bool apply, double eps, const Affine& affine) {
    mean_ = mean;
    mean_low_ = mean_low;
    if (count == 0) {
      std::fill_n(mean, channels(), 0.0);
      std::fill_n(mean_low, channels(), 0.0);
      std::fill_n(m2, channels(), 0.0);
      if (apply) fill_zero();
      return;
    }
    auto begin = [&](index c0, index c1) { choose_centers(c0, c1); };
    job_.runs = apply && job_.dtype != DType::f64 && !job_.weights.data && values_ >= exact_below &&
                layout_.per_channel() >= few_values;
    auto finish = [&](index c0, index c1) {
      if (job_.runs) widen_runs(c0, c1, count);
      if (moments_of_channels(c0, c1, count, mean, mean_low, m2)) return;
      for (index c = c0; c < c1; ++c) {
        if (moments_of_channels(c, c + 1, count, mean, mean_low, m2)) continue;
        recenter(c, mean[c]);
        moments_of_channels(c, c + 1, count, mean, mean_low, m2);
        // About the mean itself the difference can round below zero only by digits of second_;
        // anything larger is left to be seen.
        if (m2[c] < 0 && -m2[c] < 1e-9 * second_[c]) m2[c] = 0;
      }
    };
    auto coefficients = [&](index c0, index c1) {
      for (index c = c0; c < c1; ++c) inv_std_[c] = 1 / std::sqrt(m2[c] / count + eps);
      normalizing(c0, c1, from(c0, affine));
    };
    run(isa_.reduce_moments, apply ? isa_.apply_forward : nullptr, begin, finish, coefficients);
  }

  void normalize(double eps, const ValuesOf& values_of) {
    auto coefficients = [&](index c0, index c1) {
      Values v;
      double inv_std[Values::most];
      for (index b0 = c0; b0 < c1; b0 += Values::most) {
        const index n = std::min(Values::most, c1 - b0);
        values_of(b0, n, v);
        for (index i = 0; i < n; ++i) inv_std[i] = 1 / std::sqrt(v.var[i] + eps);
        normalizing(b0, b0 + n, {v.mean, v.mean_low, inv_std, v.gamma, v.beta});
      }
    };
    run(nullptr, isa_.apply_forward, nothing, nothing, coefficients);
  }

  // `reduce`: the two sums are made and returned in sum_*; otherwise they are given there.
  void backward(const Statistics& s, const Affine& affine, double count, bool reduce, bool apply,
                double* sum_grad, double* sum_grad_x_hat) {
    statistics(s);
    job_.batch_statistics = count > 0;
    // The sign of z decides what an activation lets through, so z must be what the forward pass
    // computed: the same coefficients, at the same width.
    normalizing(0, channels(), from(0, affine));
    auto finish = [&](index c0, index c1) {
      const double *first = first_, *second = second_, *inv_std = inv_std_, *center = shift_;
      index finite = 1;
      for (index c = c0; c < c1; ++c)
        finite &= index(first[c] - first[c] == 0) & index(second[c] - second[c] == 0);
      // Products of finite values may exceed float32, whose runs are summed; once more then.
      for (index c = c0; !finite && c < c1; ++c) {
        if (std::isfinite(first[c]) && std::isfinite(second[c])) continue;
        mark_wide(c);
        sum_again(c, c + 1);
      }
      for (index c = c0; c < c1; ++c) {
        // What the sums about center leave of the mean.
        const double rest = (mean_[c] - center[c]) + mean_low(c);
        sum_grad[c] = first[c];
        sum_grad_x_hat[c] = inv_std[c] * (second[c] - rest * first[c]);
      }
    };
    auto coefficients = [&](index c0, index c1) {
      double *tilt = tilt_, *level = level_;
      const double* inv_std = inv_std_;
      if (count == 0) {  // statistics that do not depend on x
        std::fill(tilt + c0, tilt + c1, 0.0);
        std::fill(level + c0, level + c1, 0.0);
      } else {
        const double per = 1 / count;
        index all_fit = 1;
        for (index c = c0; c < c1; ++c) {
          tilt[c] = inv_std[c] * sum_grad_x_hat[c] * per;
          all_fit &= fits_float32(tilt[c]);
        }
        for (index c = c0; c < c1 && (any_wide_ || !all_fit); ++c)
          if (wide_[std::size_t(c)] || !fits_float32(tilt[c]))
            normalizing_in_float64(c, 0, from(c, affine));
        for (index c = c0; c < c1; ++c)
          level[c] = sum_grad[c] * per - rest_of_mean(c) * tilt[c];
      }
    };
    run(reduce ? isa_.reduce_backward : nullptr, apply ? isa_.apply_backward : nullptr, nothing,
        finish, coefficients);
  }

  void write_back() {
    for (int k : {Out, OutResidual})
      if (packed_[k]) packed_[k]->write_back();
  }

 private:
  using Reduce = void (*)(const Job&, const Block&, double*, double*);
  using Apply = void (*)(const Job&, const Block&);
  static void nothing(index, index) {}

  // begin(c0, c1), then the two sums into first_, second_, then finish(c0, c1), then
  // coefficients(c0, c1), then the application.
  template <class Begin, class Finish, class CoefficientsOf>
  void run(Reduce reduce, Apply apply, const Begin& begin, const Finish& finish,
           const CoefficientsOf& coefficients) {
    reduce_ = reduce;
    if (reduce && apply) {
      const Partition p(layout_, fused_step());
      if (fusable(p)) return run_fused(p, reduce, apply, begin, finish, coefficients);
    }
    const Partition p(layout_, two_pass_step());
    if (reduce) {
      parallel(p.channel_blocks, values_, false, [&](index k) {
        const Block b = p.block(layout_, 0, k);
        begin(b.channel_begin, b.channel_end);
      });
      const index c = channels();
      // Each task writes its part of it; zeros first would be one more pass.
      const std::unique_ptr<double[]> partial(new double[std::size_t(p.chunks() * c * 2)]);
      const index tasks = p.chunks() * p.channel_blocks;
      parallel(tasks, values_, false, [&](index t) {
        const index chunk = t / p.channel_blocks;
        const Block b = p.block(layout_, chunk, t % p.channel_blocks);
        double* first = partial.get() + chunk * 2 * c + b.channel_begin;
        reduce_by_width(reduce, b, first, first + c);
      });
      parallel(p.channel_blocks, values_, false, [&](index k) {
        const Block b = p.block(layout_, 0, k);
        for (index at = b.channel_begin; at < b.channel_end; ++at) first_[at] = second_[at] = 0;
        for (index chunk = 0; chunk < p.chunks(); ++chunk)
          for (index at = b.channel_begin; at < b.channel_end; ++at) {
            first_[at] += partial.get()[chunk * 2 * c + at];
            second_[at] += partial.get()[chunk * 2 * c + c + at];
          }
        finish(b.channel_begin, b.channel_end);
      });
    }
    if (!apply) return;
    coefficients(0, channels());
    const index tasks = p.chunks() * p.channel_blocks;
    parallel(tasks, values_, reduce != nullptr, [&](index k) {
      apply_by_width(apply, p.block(layout_, k / p.channel_blocks, k % p.channel_blocks));
    });
  }

  template <class Begin, class Finish, class CoefficientsOf>
  void run_fused(const Partition& p, Reduce reduce, Apply apply, const Begin& begin,
                 const Finish& finish, const CoefficientsOf& coefficients) {
    const index step = p.channel_step;
    const std::unique_ptr<double[]> partial(new double[std::size_t(p.channel_blocks * step * 2)]);
    parallel(p.channel_blocks, values_, false, [&](index k) {
      const Block whole = p.block(layout_, 0, k);
      const index c0 = whole.channel_begin, c1 = whole.channel_end;
      begin(c0, c1);
      double* first = partial.get() + k * step * 2;
      double* second = first + step;
      for (index c = c0; c < c1; ++c) first_[c] = second_[c] = 0;
      for (index chunk = 0; chunk < p.chunks(); ++chunk) {
        reduce_by_width(reduce, p.block(layout_, chunk, k), first, second);
        for (index c = c0; c < c1; ++c) {
          first_[c] += first[c - c0];
          second_[c] += second[c - c0];
        }
      }
      finish(c0, c1);
      coefficients(c0, c1);
      for (index chunk = p.chunks() - 1; chunk >= 0; --chunk)
        apply_by_width(apply, p.block(layout_, chunk, k));
    });
  }

  // What one thread reads twice in a fused pass: the second time from a cache, be it the shared one.
  static index block_bytes() {
    return std::min<index>(2 << 20, std::max<index>(512 << 10, last_level_cache() / 16));
  }
  static index largest_block() { return 2 * block_bytes(); }  // of a single channel

  index bytes_per_channel() const {
    return layout_.per_channel() * size_of(job_.dtype) * inputs_;
  }

  // Channels in a block whose second pass reads from cache; not all of them either, for threads
  // share the blocks.
  index fused_step() const {
    return std::min(ceil_div(channels(), 8),
                    std::max<index>(1, block_bytes() / bytes_per_channel()));
  }
  index two_pass_step() const {
    return layout_.rows ? std::max<index>(1, std::min<index>(channels(), rows_chunk /
                                                             std::max<index>(1, layout_.inners)))
                        : std::min(channels(), widest);
  }
  // Only where channels lie apart. Side by side, a block of them is a narrow strip down the rows,
  // whose pieces fall on few cache sets where a row is a power of two long; two passes over whole
  // rows are faster, although the second reads again what the cache has lost.
  bool fusable(const Partition& p) const {
    return layout_.rows && bytes_per_channel() * p.channel_step <= largest_block() &&
           (p.channel_blocks >= 2 || values_ < serial_below);
  }

  void probe(int k, index flat) {
    probe_outer_[k] = flat / layout_.inners;
    probe_inner_[k] = flat % layout_.inners;
  }

  template <class Visit>
  void each_weight(Visit visit) const {
    const double* w = reinterpret_cast<const double*>(job_.weights.data);
    for (index o = 0; o < layout_.outers; ++o)
      for (index i = 0; i < layout_.inners; ++i)
        visit(w[o * job_.weights.outer + i * job_.weights.inner], o * layout_.inners + i);
  }

  // The median of three values of the channel: within its range whatever the offset, and not
  // moved by one outlier. It is a value of x, so a constant channel leaves differences of zero.
  void choose_centers(index c0, index c1) {
    switch (job_.dtype) {
      case DType::f32: return choose_centers_of<float>(c0, c1);
      case DType::f64: return choose_centers_of<double>(c0, c1);
      case DType::f16: return choose_centers_of<float16>(c0, c1);
      case DType::bf16: return choose_centers_of<bfloat16>(c0, c1);
    }
  }
  template <class T>
  void choose_centers_of(index c0, index c1) {
    const T* at[3];
    for (int k = 0; k < 3; ++k)
      at[k] = reinterpret_cast<const T*>(job_.x.data) + probe_outer_[k] * job_.x.outer +
              probe_inner_[k] * job_.x.inner;
    if (job_.runs) return mean_centers_of<T>(c0, c1);
    for (index c = c0; c < c1; ++c) {
      const index step = c * job_.x.channel;
      const double u = widen(at[0][step]), v = widen(at[1][step]), w = widen(at[2][step]);
      const double median = std::max(std::min(u, v), std::min(std::max(u, v), w));
      shift_[c] = std::isfinite(median) ? median : 0;
    }
  }

  // The mean of some values is hardly ever a standard deviation off, and that of equal values is their
  // value. Of columns it is taken of more: one that is summed again costs nearly a pass.
  template <class T>
  void mean_centers_of(index c0, index c1) {
    const index rows = layout_.rows ? 8 : 16;
    const index n = layout_.per_channel();
    std::fill(shift_ + c0, shift_ + c1, 0.0);
    for (index k = 0; k < rows; ++k) {
      const index flat = k * (n - 1) / (rows - 1);
      const T* x = reinterpret_cast<const T*>(job_.x.data) + flat / layout_.inners * job_.x.outer +
                   flat % layout_.inners * job_.x.inner;
      for (index c = c0; c < c1; ++c) shift_[c] += widen(x[c * job_.x.channel]);
    }
    for (index c = c0; c < c1; ++c) {
      const double center = rounded_to(shift_[c] / rows, job_.dtype);
      shift_[c] = std::isfinite(center) ? center : 0;
    }
  }

  // false: so much of a second sum is due to a bad center that digits were lost.
  bool moments_of_channels(index c0, index c1, double count, double* mean, double* mean_low,
                           double* m2) const {
    const double* center = shift_;
    const double* first = first_;
    const double* second = second_;
    index lost = 0;
    for (index c = c0; c < c1; ++c) {
      const double step = first[c] / count;
      const double rounded = center[c] + step;
      const double low = (center[c] - rounded) + step;
      const double rest = second[c] - first[c] * step;
      mean[c] = rounded;
      mean_low[c] = low - low == 0 ? low : 0;  // not of an infinite mean
      m2[c] = rest;
      lost |= index(std::fabs(second[c]) > 256 * std::fabs(rest));
    }
    return lost == 0;
  }

  // Sum channels again, in float64, where float32 runs are too coarse: where squares leave its range, as
  // those of a constant channel do, and about a center that is a standard deviation off. With second /
  // rest = r, the variance is off by (3r - 2) times what a run is, 2e-7 if each rounding is the worst.
  void widen_runs(index c0, index c1, double count) {
    const double *first = first_, *second = second_;
    const double per = 1 / count, least = 1e-28 * count;
    auto coarse = [=](index c) {
      const double rest = second[c] - first[c] * first[c] * per;
      return index(!(second[c] < 2 * rest)) | index(!(second[c] > least));
    };
    index any = 0;
    for (index c = c0; c < c1; ++c) any |= coarse(c);
    if (!any) return;
    for (index c = c0; c < c1;) {
      const index begin = c;
      while (c < c1 && coarse(c)) mark_wide(c++);
      if (c > begin) sum_again(begin, c);
      if (c == begin) ++c;
    }
  }

  // Sum one channel again about its mean: the corrected two-pass algorithm.
  void recenter(index c, double mean) {
    const double center = rounded_to(mean, job_.dtype);
    if (!std::isfinite(center) || center == shift_[c]) return;
    shift_[c] = center;
    sum_again(c, c + 1);
  }
  void sum_again(index c0, index c1) {
    std::vector<double> sums(std::size_t(2 * (c1 - c0)));
    double *first = sums.data(), *second = first + (c1 - c0);
    std::fill(first_ + c0, first_ + c1, 0.0);
    std::fill(second_ + c0, second_ + c1, 0.0);
    const Partition p(layout_, 1);
    for (index chunk = 0; chunk < p.chunks(); ++chunk) {
      Block b = p.block(layout_, chunk, 0);
      b.channel_begin = c0;
      b.channel_end = c1;
      reduce_by_width(reduce_, b, first, second);
      for (index c = c0; c < c1; ++c) {
        first_[c] += first[c - c0];
        second_[c] += second[c - c0];
      }
    }
  }

  void statistics(const Statistics& s) {
    mean_ = s.mean;
    mean_low_ = s.mean_low;
    for (index c = 0; c < channels(); ++c) inv_std_[c] = 1 / std::sqrt(s.var[c] + s.eps);
  }
  double mean_low(index c) const { return mean_low_ ? mean_low_[c] : 0; }

  // What is left of the mean once shift_ has its leading digits.
  double rest_of_mean(index c) const { return (mean_[c] - shift_[c]) + mean_low(c); }

  // Values of the channels from some c0 on, of which mean_low, gamma and beta may be null.
  struct Normalizing {
    const double *mean, *mean_low, *inv_std, *gamma, *beta;
    double low(index i) const { return mean_low ? mean_low[i] : 0; }
    double shift_of_z(index i) const { return beta ? beta[i] : 0; }
  };
  Normalizing from(index c0, const Affine& a) const {
    return {mean_ + c0, mean_low_ ? mean_low_ + c0 : nullptr, inv_std_ + c0,
            a.gamma ? a.gamma + c0 : nullptr, a.beta ? a.beta + c0 : nullptr};
  }

  // z = (x - shift) * scale + offset, with a shift that float32 holds exactly where the last step
  // runs in it; what is left of the mean is in the offset.
  void normalizing(index c0, index c1, const Normalizing& of) {
    const bool narrow = job_.dtype != DType::f64 && !job_.weights.data;
    double *shift = shift_ + c0, *scale = scale_ + c0, *offset = offset_ + c0;
    const index n = c1 - c0;
    for (index i = 0; i < n; ++i) shift[i] = narrow ? double(float(of.mean[i])) : of.mean[i];
    if (of.gamma)
      for (index i = 0; i < n; ++i) scale[i] = of.gamma[i] * of.inv_std[i];
    else
      for (index i = 0; i < n; ++i) scale[i] = of.inv_std[i];
    for (index i = 0; i < n; ++i)
      offset[i] = of.shift_of_z(i) - ((of.mean[i] - shift[i]) + of.low(i)) * scale[i];
    if (!narrow) return;
    for (index i = 0; i < n; ++i) wide_[std::size_t(c0 + i)] = 0;
    index all_fit = 1;  // as almost always
    for (index i = 0; i < n; ++i) {
      const double a = std::fabs(scale[i]), m = std::fabs(of.mean[i]);
      all_fit &= index(m < 1e30) & index(a < 1e30) & index(a > 1e-30);
    }
    if (all_fit) return;
    for (index i = 0; i < n; ++i) {
      // What is not finite is so at either width.
      const bool fits = (!(std::fabs(of.mean[i]) >= 1e30) | std::isinf(of.mean[i])) &
                        fits_float32(scale[i]);
      if (!fits) normalizing_in_float64(c0, i, of);
    }
  }

  void normalizing_in_float64(index c0, index i, const Normalizing& of) {
    const index c = c0 + i;
    mark_wide(c);
    shift_[c] = of.mean[i];
    offset_[c] = of.shift_of_z(i) - of.low(i) * scale_[c];
  }

  void mark_wide(index c) {
    wide_[std::size_t(c)] = 1;
    any_wide_.store(true, std::memory_order_relaxed);  // never unset: another thread may have set it
  }

  // The channels of a block in stretches of one width. What one channel needs changes no other:
  // its values must not depend on its neighbours'.
  template <class Visit>
  void each_width(const Block& b, const Visit& visit) const {
    if (!any_wide_.load(std::memory_order_relaxed)) return visit(job_, b);
    for (index c = b.channel_begin; c < b.channel_end;) {
      Block part = b;
      part.channel_begin = c;
      const char width = wide_[std::size_t(c)];
      while (c < b.channel_end && wide_[std::size_t(c)] == width) ++c;
      part.channel_end = c;
      if (!width) {
        visit(job_, part);
      } else {
        Job job = job_;
        job.wide = true;
        visit(job, part);
      }
    }
  }
  void apply_by_width(Apply apply, const Block& b) const {
    each_width(b, [&](const Job& job, const Block& part) { apply(job, part); });
  }
  void reduce_by_width(Reduce reduce, const Block& b, double* first, double* second) const {
    each_width(b, [&](const Job& job, const Block& part) {
      const index at = part.channel_begin - b.channel_begin;
      reduce(job, part, first + at, second + at);
    });
  }

  void fill_zero() {
    for (int k : {Out, OutResidual}) {
      const Operand& o = k == Out ? job_.out : job_.out_residual;
      if (!o.data) continue;
      const std::size_t bytes = std::size_t(size_of(job_.dtype));
      for (index a = 0; a < layout_.outers; ++a)
        for (index b = 0; b < layout_.inners; ++b)
          for (index c = 0; c < layout_.channels; ++c)
            std::memset(o.data + (a * o.outer + b * o.inner + c * o.channel) * index(bytes), 0,
                        bytes);
    }
  }

  const InstructionSet& isa_;
  std::vector<char> wide_;  // channels whose last step is float64 although x is narrower
  std::atomic<bool> any_wide_{false};
  Layout layout_;
  Job job_;
  std::unique_ptr<Packed> packed_[operands];
  index values_ = 0, inputs_ = 1;
  std::unique_ptr<double[]> storage_;
  double *shift_, *scale_, *offset_, *tilt_, *level_, *first_, *second_, *inv_std_;
  const double* mean_ = nullptr;
  const double* mean_low_ = nullptr;
  index probe_outer_[3] = {}, probe_inner_[3] = {};
  Reduce reduce_ = nullptr;
};

const Array none;

bool empty(const Array& a) {
  for (int d = 0; d < a.rank; ++d)
    if (a.shape[d] == 0) return true;
  return false;
}

}  // namespace

Count moments(const Array& x, const Array& weights, int axis, double* mean, double* mean_low,
               double* m2) {
  return forward(x, none, weights, none, axis, 0, {}, {}, mean, mean_low, m2);
}

Count forward(const Array& x, const Array& residual, const Array& weights, const Array& y,
               int axis, double eps, const Affine& affine, const Epilogue& epilogue, double* mean,
               double* mean_low, double* m2) {
  if (empty(x)) {
    std::fill_n(mean, x.shape[axis], 0.0);
    std::fill_n(mean_low, x.shape[axis], 0.0);
    std::fill_n(m2, x.shape[axis], 0.0);
    return {};
  }
  Call call(x, none, residual, weights, y, none, axis, epilogue);
  const Count count = call.count();
  call.moments_and_maybe_normalize(count.count, mean, mean_low, m2, bool(y), eps, affine);
  call.write_back();
  return count;
}

void normalize(const Array& x, const Array& residual, const Array& weights, const Array& y,
               int axis, double eps, const ValuesOf& values_of, const Epilogue& epilogue) {
  if (empty(x)) return;
  Call call(x, none, residual, weights, y, none, axis, epilogue);
  call.normalize(eps, values_of);
  call.write_back();
}

void normalize(const Array& x, const Array& residual, const Array& weights, const Array& y,
               int axis, const Statistics& s, const Affine& affine, const Epilogue& epilogue) {
  normalize(x, residual, weights, y, axis, s.eps, [&](index c, index n, Values& v) {
    const auto fill = [=](double* to, const double* from, double otherwise) {
      if (from)
        std::copy_n(from + c, n, to);
      else
        std::fill_n(to, n, otherwise);
    };
    fill(v.mean, s.mean, 0);
    fill(v.mean_low, s.mean_low, 0);
    fill(v.var, s.var, 1);
    fill(v.gamma, affine.gamma, 1);
    fill(v.beta, affine.beta, 0);
  }, epilogue);
}

void backward_sums(const Array& grad_y, const Array& x, const Array& y,
                   const Array& weights, int axis, const Statistics& s, const Affine& affine,
                   const Epilogue& epilogue, double* sum_grad, double* sum_grad_x_hat) {
  if (empty(x)) {
    std::fill_n(sum_grad, x.shape[axis], 0.0);
    std::fill_n(sum_grad_x_hat, x.shape[axis], 0.0);
    return;
  }
  Call call(x, grad_y, y, weights, none, none, axis, epilogue);
  call.backward(s, affine, 0, true, false, sum_grad, sum_grad_x_hat);
}

void backward(const Array& grad_y, const Array& x, const Array& y, const Array& weights,
              const Array& grad_x, const Array& grad_residual, int axis, double count,
              const Statistics& s, const Affine& affine, const Epilogue& epilogue,
              const double* sum_grad, const double* sum_grad_x_hat) {
  if (empty(x)) return;
  Call call(x, grad_y, y, weights, grad_x, grad_residual, axis, epilogue);
  call.backward(s, affine, count, false, true, const_cast<double*>(sum_grad),
                const_cast<double*>(sum_grad_x_hat));
  call.write_back();
}

void backward_fused(const Array& grad_y, const Array& x, const Array& y,
                    const Array& weights, const Array& grad_x, const Array& grad_residual,
                    int axis, double count, const Statistics& s, const Affine& affine,
                    const Epilogue& epilogue, double* sum_grad, double* sum_grad_x_hat) {
  if (empty(x)) {
    std::fill_n(sum_grad, x.shape[axis], 0.0);
    std::fill_n(sum_grad_x_hat, x.shape[axis], 0.0);
    return;
  }
  Call call(x, grad_y, y, weights, grad_x, grad_residual, axis, epilogue);
  call.backward(s, affine, count, true, true, sum_grad, sum_grad_x_hat);
  call.write_back();
}

void copy(void* to, const void* from, std::size_t bytes) {
  const index piece = 1 << 18;
  const index tasks = ceil_div(index(bytes), piece);
  const InstructionSet& isa = current_instruction_set();
  const bool stream = index(bytes) > last_level_cache();
  parallel(tasks, index(bytes) / 4, false, [&](index t) {
    const std::size_t at = std::size_t(t * piece);
    isa.copy(static_cast<char*>(to) + at, static_cast<const char*>(from) + at,
             std::min<std::size_t>(std::size_t(piece), bytes - at), stream);
  });
}

}  // namespace bn
