// The bodies of the kernels on one block, compiled once per instruction set (BN_ISA names it).
// Single-threaded, and free of decisions about accuracy or partition: those are driver.cpp's. What
// may be seen as other columns than it is, columns.hpp says.
//
// Two loops over two layouts. A reduction makes two float64 sums per channel; an application turns
// elements of x into elements of y. Forward and backward differ only in the term they add or write.
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "half.hpp"
#include "kernels.hpp"

namespace bn {
namespace BN_ISA {
namespace {

#include "simd.hpp"
#include "columns.hpp"

// What follows (x - shift) * scale + offset: nothing, an activation, or a residual and then one.
enum : int { plain = 0, activated = 1, full = 2 };

// A reduction adds up the moments about `center`, or the two sums of the backward pass; an
// application writes y, or grad_x with batch statistics, or grad_x with fixed ones.
enum : int { forward = 0, backward_batch = 1, backward_fixed = 2 };

template <class P>
struct Slope {
  P value;
  bool zero;
  explicit Slope(const Epilogue& e)
      : value(P(e.activation == Activation::identity ? 1
                : e.activation == Activation::relu   ? 0
                                                     : e.slope)),
        zero(value == P(0)) {}
};

// Every supported activation is z where z > 0 and slope * z elsewhere; a slope of zero is written
// as zero, for 0 * inf would be NaN and -1 * 0 would be -0.
template <class P, int N>
BN_INLINE Vec<P, N> activate(Vec<P, N> z, const Slope<P>& slope) {
  const Vec<P, N> below = slope.zero ? nan_or_zero<P, N>(z) : z * splat<P, N>(slope.value);
  return where_positive<P, N>(z, z, below);
}

template <class P, int N>
BN_INLINE Vec<P, N> activate_gradient(Vec<P, N> z, Vec<P, N> g, const Slope<P>& slope) {
  const Vec<P, N> below = slope.zero ? splat<P, N>(0) : g * splat<P, N>(slope.value);
  return where_positive<P, N>(z, g, below);
}

template <class T>
struct Pointers {
  const T *x, *grad, *residual;
  const double* weights;
  T *out, *out_residual;

  Pointers(const Job& j, index o, index i, index c)
      : x(at(j.x, o, i, c)),
        grad(at(j.grad, o, i, c)),
        residual(at(j.residual, o, i, c)),
        weights(reinterpret_cast<const double*>(j.weights.data)),
        out(at(j.out, o, i, c)),
        out_residual(at(j.out_residual, o, i, c)) {
    if (weights) weights += o * j.weights.outer + i * j.weights.inner;
  }

  BN_INLINE void next_row(const Job& j) {  // of what columns read
    x += j.x.inner;
    if (grad) grad += j.grad.inner;
    if (residual) residual += j.residual.inner;
    if (weights) weights += j.weights.inner;
  }

 private:
  static T* at(const Operand& a, index o, index i, index c) {
    if (!a.data) return nullptr;
    return reinterpret_cast<T*>(a.data) + o * a.outer + i * a.inner + c * a.channel;
  }
};

template <class P, int N, bool Part, class T>
BN_INLINE Vec<P, N> read(const T* p, index n) {
  if constexpr (Part) {
    return load_part<P, N>(p, n);
  } else {
    return load<P, N>(p);
  }
}

template <int N, bool Part, class T, class V>
BN_INLINE void write(T* p, V v, index n) {
  if constexpr (Part) {
    store_part<N>(p, v, n);
  } else {
    store<N>(p, v);
  }
}

// The per-channel values of a job as vectors: one value in all lanes (rows), or N channels side by
// side (columns; `n` of them exist).
template <class P, int N, int E, int Mode>
struct Coefficients {
  Vec<P, N> shift, scale, offset, tilt, level;

  // `get` makes a vector of what the source calls shift, scale and so on.
  template <class Source, class Get>
  BN_INLINE void take(const Source& j, Get get) {
    constexpr bool z = Mode == forward || E != plain;
    if (z || Mode == backward_batch) shift = get(j.shift);
    scale = get(j.scale);
    if (z) offset = get(j.offset);
    if (Mode == backward_batch) {
      tilt = get(j.tilt);
      level = get(j.level);
    }
  }
  BN_INLINE void of_channel(const Job& j, index c) {
    take(j, [&](const double* a) { return splat<P, N>(a[c]); });
  }
  template <bool Part>
  BN_INLINE void of_channels(const Job& j, index c, index n) {
    take(j, [&](const double* a) { return read<P, N, Part>(a + c, n); });
  }
};

// Tiles pass over a block of rows one beside the other, which no hardware prefetcher recognises as
// the one stream that it is; so each row asks for its like in the next block.
template <index Bytes>
BN_INLINE void prefetch_row(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
  for (index k = 0; k < Bytes; k += 64) __builtin_prefetch(static_cast<const char*>(p) + k, 0, 2);
#else
  (void)p;
#endif
}

// ---- reductions ---------------------------------------------------------------------------------

// Moments are summed in float64 throughout. The sums of the backward pass need fewer digits (1e-5
// of their norm is promised), so where the last step runs in float32 they are taken in float32 over
// runs of 16 vectors, and only a run's sum goes to float64: half the instructions.
constexpr index run_length = 16;

template <class T, class P, int E, bool Weighted, int Mode>
struct Reduction {
  static constexpr bool runs = Mode != forward && sizeof(P) == 4;
  using S = typename std::conditional<runs, float, double>::type;
  static constexpr int N = runs ? F : D;
  static constexpr bool reads_grad = Mode != forward;
  using V = Vec<S, N>;

  V center;
  Coefficients<S, N, E, forward> affine;  // only where z is needed: backward with an epilogue

  // The contribution of n (or N) elements at p[i]; `w` is their weight.
  template <bool Part, bool Rows>
  BN_INLINE void add(const Pointers<T>& p, index i, index n, V w, const Slope<S>& slope, V& first,
                     V& second) const {
    const V x = read<S, N, Part>(p.x + i, n);
    V d = x - center;
    if constexpr (Weighted) d = where_weighted<S, N>(w, d);
    if constexpr (Mode == forward) {
      // Lanes past the end hold 0 - center; in columns they are dropped with their channel.
      if constexpr (Part && Rows) d = first_lanes<S, N>(d, n);
      const V weighted = Weighted ? w * d : d;
      first += weighted;
      second += weighted * d;
    } else {
      V g = read<S, N, Part>(p.grad + i, n);
      if constexpr (E != plain) {
        V z = (x - affine.shift) * affine.scale + affine.offset;
        if constexpr (E == full)
          if (!Weighted || p.residual) z = read<S, N, Part>(p.residual + i, n);  // y: of one sign
        g = activate_gradient<S, N>(z, g, slope);
      }
      if constexpr (Weighted) g = where_weighted<S, N>(w, g);
      first += g;
      second += g * d;
    }
  }

  BN_INLINE void of_channel(const Job& j, index c) {
    center = splat<S, N>(j.center[c]);
    if constexpr (E != plain && Mode != forward) affine.of_channel(j, c);
  }
  template <bool Part>
  BN_INLINE void of_channels(const Job& j, index c, index n) {
    center = read<S, N, Part>(j.center + c, n);
    if constexpr (E != plain && Mode != forward) affine.template of_channels<Part>(j, c, n);
  }
};

template <class R, class T, bool Weighted>
void reduce_rows(const Job& job, const Block& b, double* out1, double* out2) {
  using S = typename R::S;
  using V = typename R::V;
  constexpr int N = R::N;
  constexpr index together = 16;  // channels whose sums are open at once: 4 KiB of them
  // Two chains per sum: an addition takes 3-4 cycles, and one iteration issues four of them.
  struct Sums {
    V first[2], second[2];
  };
  const Slope<S> slope(job.epilogue);
  const index length = b.inner_end - b.inner_begin;
  const index iterations = (length + 2 * N - 1) / (2 * N);
  const index run = R::runs ? run_length * 2 * N : length;
  const index rows_in_run = iterations < run_length ? run_length / iterations : 1;
  for (index c0 = b.channel_begin; c0 < b.channel_end; c0 += together) {
    const index c1 = c0 + together < b.channel_end ? c0 + together : b.channel_end;
    Sums sums[together] = {};
    Vec<double, D> total1[together] = {}, total2[together] = {};
    auto flush = [&](index c, Sums& s) {
      total1[c] += fold<N>(s.first[0] + s.first[1]);
      total2[c] += fold<N>(s.second[0] + s.second[1]);
      s = Sums{};
    };
    index rows = 0;
    for (index o = b.outer_begin; o < b.outer_end; ++o) {
      for (index c = c0; c < c1; ++c) {
        R r;
        r.of_channel(job, c);
        const Pointers<T> p(job, o, b.inner_begin, c);
        auto weight = [&](index i, auto part, index n) {
          if constexpr (Weighted) {
            return read<S, N, decltype(part)::value>(p.weights + i, n);
          } else {
            return V{};
          }
        };
        using Whole = std::false_type;
        using Part = std::true_type;
        Sums s = sums[c - c0];
        for (index begin = 0; begin < length; begin += run) {
          const index end = length - begin > run ? begin + run : length;
          index i = begin;
          for (; i + 2 * N <= end; i += 2 * N) {
            r.template add<false, true>(p, i, N, weight(i, Whole{}, N), slope, s.first[0],
                                        s.second[0]);
            r.template add<false, true>(p, i + N, N, weight(i + N, Whole{}, N), slope, s.first[1],
                                        s.second[1]);
          }
          if (i + N <= end) {
            r.template add<false, true>(p, i, N, weight(i, Whole{}, N), slope, s.first[0],
                                        s.second[0]);
            i += N;
          }
          if (i < end) {
            const index n = end - i;
            r.template add<true, true>(p, i, n, weight(i, Part{}, n), slope, s.first[1],
                                       s.second[1]);
          }
          if (R::runs && iterations >= run_length) flush(c - c0, s);
        }
        sums[c - c0] = s;
      }
      if (R::runs && iterations < run_length && ++rows == rows_in_run) {
        for (index c = c0; c < c1; ++c) flush(c - c0, sums[c - c0]);
        rows = 0;
      }
    }
    for (index c = c0; c < c1; ++c) {
      flush(c - c0, sums[c - c0]);
      out1[c - b.channel_begin] = sum_lanes(total1[c - c0]);
      out2[c - b.channel_begin] = sum_lanes(total2[c - c0]);
    }
  }
}

// `Tile` vectors of channels side by side, over rows [i0, i1) of one outer index, added to out1
// and out2.
template <class R, class T, bool Weighted, int Tile, bool Part>
BN_INLINE void reduce_tile(const Job& job, index o, index i0, index i1, index ahead, index c,
                           index n, double* out1, double* out2) {
  using S = typename R::S;
  using V = typename R::V;
  constexpr int N = R::N;
  const Slope<S> slope(job.epilogue);
  R r[Tile];
  V first[Tile] = {}, second[Tile] = {};
  BN_UNROLL
  for (int t = 0; t < Tile; ++t) {
    r[t].template of_channels<Part>(job, c + t * N, n);
    if constexpr (!R::runs) {
      first[t] = read<S, N, Part>(out1 + t * N, n);
      second[t] = read<S, N, Part>(out2 + t * N, n);
    }
  }
  Pointers<T> p(job, o, i0, c);
  for (index i = i0; i < i1; ++i, p.next_row(job)) {
    if (ahead) {
      prefetch_row<Tile * N * index(sizeof(T))>(p.x + ahead * job.x.inner);
      if constexpr (R::reads_grad)
        prefetch_row<Tile * N * index(sizeof(T))>(p.grad + ahead * job.grad.inner);
    }
    V w{};
    if constexpr (Weighted) w = splat<S, N>(*p.weights);
    BN_UNROLL
    for (int t = 0; t < Tile; ++t)
      r[t].template add<Part, false>(p, t * N, n, w, slope, first[t], second[t]);
  }
  BN_UNROLL
  for (int t = 0; t < Tile; ++t) {
    if constexpr (R::runs) {
      add_to<N, Part>(out1 + t * N, first[t], n);
      add_to<N, Part>(out2 + t * N, second[t], n);
    } else {
      write<N, Part>(out1 + t * N, first[t], n);
      write<N, Part>(out2 + t * N, second[t], n);
    }
  }
}

template <class R, class T, bool Weighted, int Tile>
void reduce_columns(const Job& job, const Block& b, double* out1, double* out2) {
  constexpr int N = R::N;
  const index channels = b.channel_end - b.channel_begin;
  // Rows whose block stays in the first-level cache while the tiles pass over it.
  index step = index(32768 / sizeof(T)) / channels;
  if (step < 16) step = 16;
  if (channels <= Tile * N) step = b.inner_end - b.inner_begin;
  if (R::runs) step = run_length;
  for (index o = b.outer_begin; o < b.outer_end; ++o)
    for (index i0 = b.inner_begin; i0 < b.inner_end; i0 += step) {
      const index i1 = i0 + step < b.inner_end ? i0 + step : b.inner_end;
      const index ahead = channels > Tile * N ? i1 - i0 : 0;
      index c = 0;
      for (; c + Tile * N <= channels; c += Tile * N)
        reduce_tile<R, T, Weighted, Tile, false>(job, o, i0, i1, ahead, b.channel_begin + c, N,
                                                 out1 + c, out2 + c);
      for (; c + 4 * N <= channels; c += 4 * N)
        reduce_tile<R, T, Weighted, 4, false>(job, o, i0, i1, ahead, b.channel_begin + c, N,
                                              out1 + c, out2 + c);
      for (; c + N <= channels; c += N)
        reduce_tile<R, T, Weighted, 1, false>(job, o, i0, i1, ahead, b.channel_begin + c, N, out1 + c,
                                              out2 + c);
      if (c < channels)
        reduce_tile<R, T, Weighted, 1, true>(job, o, i0, i1, ahead, b.channel_begin + c,
                                             channels - c, out1 + c, out2 + c);
    }
}

template <class T, class P, int E, bool Weighted, int Mode>
void reduce(const Job& job, const Block& b, double* out1, double* out2) {
  using R = Reduction<T, P, E, Weighted, Mode>;
  using Plain = Reduction<T, P, E, false, Mode>;
  // Three registers a vector of channels: 8 of them fill 32 registers, 4 of them 16.
  constexpr int tile = D == 8 ? 8 : 4;
  auto clear = [](double* out, index n) { std::memset(out, 0, std::size_t(n) * sizeof(double)); };
  const Columns::Members alone = {&Job::center};
  const Columns::Members with_z = {&Job::center, &Job::shift, &Job::scale, &Job::offset};
  const Columns::Members& used = E != plain && Mode != forward ? with_z : alone;
  auto columns = [&](const Columns& k) {
    alignas(64) double sums1[widest], sums2[widest];
    clear(sums1, k.block.channel_end);
    clear(sums2, k.block.channel_end);
    reduce_columns<Plain, T, false, tile>(k.job, k.block, sums1, sums2);
    k.each_column([&](index v, index c) {
      out1[c - b.channel_begin] += sums1[v];
      out2[c - b.channel_begin] += sums2[v];
    });
  };
  clear(out1, b.channel_end - b.channel_begin);
  clear(out2, b.channel_end - b.channel_begin);
  if (!job.rows) {
    // Not cut where lines begin: the order of summation should not depend on an address.
    each_of_columns(job, b, nullptr, 64, used, columns, [&](const Block& part) {
      const index at = part.channel_begin - b.channel_begin;
      reduce_columns<R, T, Weighted, tile>(job, part, out1 + at, out2 + at);
    });
  } else if (!each_of_short_rows(job, b, job.x, used, columns)) {
    reduce_rows<R, T, Weighted>(job, b, out1, out2);
  }
}

// ---- applications -------------------------------------------------------------------------------

template <class T, class P, int E, bool Weighted, int Mode>
struct Application {
  static constexpr int N = sizeof(P) == 4 ? F : D;
  static constexpr bool backward = Mode != forward;
  using V = Vec<P, N>;
  Coefficients<P, N, E, Mode> k;
  bool stream = false;  // whole vectors past the cache: `out` and out_residual are aligned

  template <bool Part>
  BN_INLINE void at(const Pointers<T>& p, index i, index n, V w, const Slope<P>& slope, T* out,
                    T* out_residual) const {
    constexpr bool needs_z = Mode == forward || E != plain;
    V d{}, z{};
    if constexpr (needs_z || Mode == backward_batch) d = read<P, N, Part>(p.x + i, n) - k.shift;
    if constexpr (needs_z) z = d * k.scale + k.offset;
    if constexpr (E == full) {
      if (!Weighted || p.residual) {
        const V r = read<P, N, Part>(p.residual + i, n);
        z = Mode == forward ? z + r : r;
      }
    }
    if constexpr (Mode == forward) {
      V y = z;
      if constexpr (E != plain) y = activate<P, N>(z, slope);
      if constexpr (Weighted) y = where_weighted<P, N>(w, y);
      put<Part>(out + i, y, n);
    } else {
      V g = read<P, N, Part>(p.grad + i, n);
      if constexpr (E != plain) g = activate_gradient<P, N>(z, g, slope);
      if constexpr (E == full) {
        if (out_residual) {
          V gr = g;
          if constexpr (Weighted) gr = where_weighted<P, N>(w, gr);
          put<Part>(out_residual + i, gr, n);
        }
      }
      if constexpr (Mode == backward_batch) {
        if constexpr (Weighted) {
          g = g - w * (k.level + d * k.tilt);
        } else {
          g = (g - k.level) - d * k.tilt;
        }
      }
      g = g * k.scale;
      if constexpr (Weighted) g = where_weighted<P, N>(w, g);
      put<Part>(out + i, g, n);
    }
  }

 private:
  template <bool Part>
  BN_INLINE void put(T* p, V v, index n) const {
    if (!Part && stream)
      store_past_cache<N>(p, v);
    else
      write<N, Part>(p, v, n);
  }
};

// The coefficients of columns, rounded to the type of the last step once for all rows of a block:
// those of N columns side by side, then those of the next N. In five arrays a power of two long
// they would compete with one another, and with the rows, for the same lines of the first-level cache.
template <class P, int N>
struct CoefficientTable {
  static constexpr int kinds = 5;
  alignas(64) P values[kinds * (widest + N)];

  CoefficientTable(const Job& j, index c0, index width, bool backward) {
    const double* from[kinds] = {j.shift, j.scale, j.offset, j.tilt, j.level};
    for (int k = 0; k < (backward ? kinds : 3); ++k)
      for (index c = 0; c < width; c += N) {
        P* to = values + c * kinds + k * N;
        if (width - c >= N)
          for (int i = 0; i < N; ++i) to[i] = P(from[k][c0 + c + i]);
        else
          for (index i = 0; i < N; ++i) to[i] = i < width - c ? P(from[k][c0 + c + i]) : P(0);
      }
  }

  // From column c on, a multiple of N.
  template <class Coefficients>
  BN_INLINE void get(index c, Coefficients& k) const {
    const P* at = values + c * kinds;
    k.take(*this, [&](int kind) { return load<P, N>(at + kind * N); });
  }
  enum : int { shift, scale, offset, tilt, level };
};

// How many of n values to write before those that go past the cache; n if none do.
template <class T>
index before_stream(const Job& job, const T* out, const T* out_residual, index n) {
  if (!job.stream || (out_residual && offset_in_line(out_residual) != offset_in_line(out))) return n;
  return smaller(n, values_to_line(reinterpret_cast<const char*>(out), sizeof(T)));
}

template <class A, class T, class P, bool Weighted>
void apply_rows(const Job& job, const Block& b) {
  constexpr int N = A::N;
  using V = Vec<P, N>;
  const Slope<P> slope(job.epilogue);
  const index length = b.inner_end - b.inner_begin;
  for (index o = b.outer_begin; o < b.outer_end; ++o)
    for (index c = b.channel_begin; c < b.channel_end; ++c) {
      A a;
      a.k.of_channel(job, c);
      const Pointers<T> p(job, o, b.inner_begin, c);
      auto some = [&](index i, auto part, index n) {
        constexpr bool Part = decltype(part)::value;
        V w{};
        if constexpr (Weighted) w = read<P, N, Part>(p.weights + i, n);
        a.template at<Part>(p, i, n, w, slope, p.out, p.out_residual);
      };
      auto values = [&](index i, index end) {
        for (; i + N <= end; i += N) some(i, std::false_type{}, N);
        if (i < end) some(i, std::true_type{}, end - i);
      };
      const index first = before_stream(job, p.out, p.out_residual, length);
      values(0, first);
      if (first == length) continue;
      a.stream = true;
      values(first, length);
    }
}

// `Tile` vectors of channels from c on, over all rows.
template <class A, class T, class P, bool Weighted, int Tile, bool Part>
BN_INLINE void apply_tile(const Job& job, const Block& b, const CoefficientTable<P, A::N>& table,
                          index o, index c, index n, bool stream) {
  constexpr int N = A::N;
  using V = Vec<P, N>;
  const Slope<P> slope(job.epilogue);
  A a[Tile];
  BN_UNROLL
  for (int t = 0; t < Tile; ++t) {
    table.get(c + t * N, a[t].k);
    a[t].stream = stream;
  }
  Pointers<T> p(job, o, b.inner_begin, b.channel_begin + c);
  T *out = p.out, *out_residual = p.out_residual;
  for (index i = b.inner_begin; i < b.inner_end; ++i, p.next_row(job)) {
    V w{};
    if constexpr (Weighted) w = splat<P, N>(*p.weights);
    BN_UNROLL
    for (int t = 0; t < Tile; ++t)
      a[t].template at<Part>(p, t * N, n, w, slope, out, out_residual);
    out += job.out.inner;
    if (out_residual) out_residual += job.out_residual.inner;
  }
}

// Columns [c, end) of one row.
template <class A, class T, class P, bool Weighted>
BN_INLINE void apply_row(const Job& job, const Block& b, const CoefficientTable<P, A::N>& table,
                         index o, index i, index c, index end, bool stream) {
  constexpr int N = A::N;
  using V = Vec<P, N>;
  const Slope<P> slope(job.epilogue);
  const Pointers<T> p(job, o, i, b.channel_begin);
  V w{};
  if constexpr (Weighted) w = splat<P, N>(*p.weights);
  A a;
  a.stream = stream;
  for (; c + N <= end; c += N) {
    table.get(c, a.k);
    a.template at<false>(p, c, N, w, slope, p.out, p.out_residual);
  }
  if (c < end) {
    table.get(c, a.k);
    a.template at<true>(p, c, end - c, w, slope, p.out, p.out_residual);
  }
}

template <class A, class T, class P, bool Weighted>
void apply_columns(const Job& job, const Block& b) {
  constexpr int N = A::N;
  constexpr int tile = 4;
  const index width = b.channel_end - b.channel_begin;
  const CoefficientTable<P, N> table(job, b.channel_begin, width, A::backward);
  for (index o = b.outer_begin; o < b.outer_end; ++o) {
    const Pointers<T> p(job, o, b.inner_begin, b.channel_begin);
    const bool stream = before_stream(job, p.out, p.out_residual, width) == 0 &&
                        job.out.inner * index(sizeof(T)) % 64 == 0 &&
                        job.out_residual.inner * index(sizeof(T)) % 64 == 0;
    if (width <= tile * N) {  // registers hold the coefficients
      index c = 0;
      for (; c + tile * N <= width; c += tile * N)
        apply_tile<A, T, P, Weighted, tile, false>(job, b, table, o, c, N, stream);
      for (; c + N <= width; c += N)
        apply_tile<A, T, P, Weighted, 1, false>(job, b, table, o, c, N, stream);
      if (c < width) apply_tile<A, T, P, Weighted, 1, true>(job, b, table, o, c, width - c, stream);
      continue;
    }
    // Row by row, as memory has them; but where the first-level cache does not hold the
    // coefficients of a row, two share what it does hold.
    constexpr index held = 1024;
    const index together = width <= held ? 1 : 2;
    for (index first = b.inner_begin; first < b.inner_end; first += together) {
      const index last = smaller(b.inner_end, first + together);
      for (index c = 0; c < width; c += held)
        for (index i = first; i < last; ++i)
          apply_row<A, T, P, Weighted>(job, b, table, o, i, c, smaller(width, c + held), stream);
    }
  }
}

template <class T, class P, int E, bool Weighted, int Mode>
void apply(const Job& job, const Block& b) {
  using A = Application<T, P, E, Weighted, Mode>;
  using Plain = Application<T, P, E, false, Mode>;
  const Columns::Members forwards = {&Job::shift, &Job::scale, &Job::offset};
  const Columns::Members backwards = {&Job::shift, &Job::scale, &Job::offset, &Job::tilt,
                                      &Job::level};
  const Columns::Members& used = A::backward ? backwards : forwards;
  auto columns = [](const Columns& k) { apply_columns<Plain, T, P, false>(k.job, k.block); };
  if (!job.rows)
    each_of_columns(job, b, &job.out, 4 * A::N, used, columns,
                    [&](const Block& part) { apply_columns<A, T, P, Weighted>(job, part); });
  else if (!each_of_short_rows(job, b, job.out, used, columns))
    apply_rows<A, T, P, Weighted>(job, b);
  if (job.stream) stream_end();
}

// ---- from a job's run-time properties to the instance that does it ------------------------------

template <class Call>
void with_types(const Job& job, Call call) {
  // Weighted work always ends in float64: masks are rare, and one body less is compiled for each.
  const bool wide = job.wide || job.weights.data;
  switch (job.dtype) {
    case DType::f32: return wide ? call(float{}, double{}) : call(float{}, float{});
    case DType::f64: return call(double{}, double{});
    case DType::f16: return wide ? call(float16{}, double{}) : call(float16{}, float{});
    case DType::bf16: return wide ? call(bfloat16{}, double{}) : call(bfloat16{}, float{});
  }
}

template <int V>
using Constant = std::integral_constant<int, V>;

// call(T{}, P{}, epilogue, weighted)
template <class Call>
void with_kernel(const Job& job, Call call) {
  const bool acts = job.epilogue.activation != Activation::identity;
  with_types(job, [&](auto t, auto p) {
    if (job.weights.data) {
      if constexpr (std::is_same<decltype(p), double>::value) {
        if (acts || job.residual.data) return call(t, p, Constant<full>{}, std::true_type{});
        return call(t, p, Constant<plain>{}, std::true_type{});
      }
    } else {
      if (job.residual.data) return call(t, p, Constant<full>{}, std::false_type{});
      if (acts) return call(t, p, Constant<activated>{}, std::false_type{});
      return call(t, p, Constant<plain>{}, std::false_type{});
    }
  });
}

void reduce_moments(const Job& job, const Block& b, double* out1, double* out2) {
  with_types(job, [&](auto t, auto) {
    using T = decltype(t);
    if (job.weights.data)
      reduce<T, double, plain, true, forward>(job, b, out1, out2);
    else
      reduce<T, double, plain, false, forward>(job, b, out1, out2);
  });
}

void reduce_backward(const Job& job, const Block& b, double* out1, double* out2) {
  with_kernel(job, [&](auto t, auto p, auto e, auto w) {
    reduce<decltype(t), decltype(p), decltype(e)::value, decltype(w)::value, backward_batch>(
        job, b, out1, out2);
  });
}

void apply_forward(const Job& job, const Block& b) {
  with_kernel(job, [&](auto t, auto p, auto e, auto w) {
    apply<decltype(t), decltype(p), decltype(e)::value, decltype(w)::value, forward>(job, b);
  });
}

void apply_backward(const Job& job, const Block& b) {
  with_kernel(job, [&](auto t, auto p, auto e, auto w) {
    if (job.batch_statistics)
      apply<decltype(t), decltype(p), decltype(e)::value, decltype(w)::value, backward_batch>(job,
                                                                                              b);
    else
      apply<decltype(t), decltype(p), decltype(e)::value, decltype(w)::value, backward_fixed>(job,
                                                                                              b);
  });
}

void copy_block(char* to, const char* from, std::size_t bytes, bool stream) {
  if (stream) {
    stream_out(to, from, bytes);
    stream_end();
  } else {
    std::memcpy(to, from, bytes);
  }
}

}  // namespace

#define BN_TEXT_(x) #x
#define BN_TEXT(x) BN_TEXT_(x)
extern const InstructionSet table;
const InstructionSet table = {BN_TEXT(BN_ISA), reduce_moments, reduce_backward,
                              apply_forward,   apply_backward, copy_block};

}  // namespace BN_ISA
}  // namespace bn
