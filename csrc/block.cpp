// The bodies of the kernels on one block, compiled once per instruction set (BN_ISA names it).
// Single-threaded, and free of decisions about accuracy or partition: those are driver.cpp's.
//
// Two loops over two layouts. A reduction makes two float64 sums per channel; an application turns
// elements of x into elements of y. Forward and backward differ only in the term they add or write.
#include <cstdint>
#include <cstring>
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
  template <bool Part, class Source>
  BN_INLINE void of_channels(const Source& j, index c, index n) {
    take(j, [&](const auto* a) { return read<P, N, Part>(a + c, n); });
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
          if (!Weighted || p.residual) z = z + read<S, N, Part>(p.residual + i, n);
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
      add_to<N>(out1 + t * N, first[t], n);
      add_to<N>(out2 + t * N, second[t], n);
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
  std::memset(out1, 0, std::size_t(channels) * sizeof(double));
  std::memset(out2, 0, std::size_t(channels) * sizeof(double));
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
  // Three registers a vector of channels: 8 of them fill 32 registers, 4 of them 16.
  constexpr int tile = D == 8 && !R::runs ? 8 : 4;
  if (job.rows)
    reduce_rows<R, T, Weighted>(job, b, out1, out2);
  else
    reduce_columns<R, T, Weighted, tile>(job, b, out1, out2);
}

// ---- applications -------------------------------------------------------------------------------

template <class T, class P, int E, bool Weighted, int Mode>
struct Application {
  static constexpr int N = sizeof(P) == 4 ? F : D;
  static constexpr bool backward = Mode != forward;
  using V = Vec<P, N>;
  Coefficients<P, N, E, Mode> k;

  template <bool Part>
  BN_INLINE void at(const Pointers<T>& p, index i, index n, V w, const Slope<P>& slope, T* out,
                    T* out_residual) const {
    constexpr bool needs_z = Mode == forward || E != plain;
    V d{}, z{};
    if constexpr (needs_z || Mode == backward_batch) d = read<P, N, Part>(p.x + i, n) - k.shift;
    if constexpr (needs_z) z = d * k.scale + k.offset;
    if constexpr (E == full)
      if (!Weighted || p.residual) z = z + read<P, N, Part>(p.residual + i, n);
    if constexpr (Mode == forward) {
      V y = z;
      if constexpr (E != plain) y = activate<P, N>(z, slope);
      if constexpr (Weighted) y = where_weighted<P, N>(w, y);
      write<N, Part>(out + i, y, n);
    } else {
      V g = read<P, N, Part>(p.grad + i, n);
      if constexpr (E != plain) g = activate_gradient<P, N>(z, g, slope);
      if constexpr (E == full) {
        if (out_residual) {
          V gr = g;
          if constexpr (Weighted) gr = where_weighted<P, N>(w, gr);
          write<N, Part>(out_residual + i, gr, n);
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
      write<N, Part>(out + i, g, n);
    }
  }
};

constexpr index scratch_bytes = 4096;

// The coefficients of some channels side by side, rounded to the type of the last step once for
// all rows of a block.
template <class P>
struct CoefficientTable {
  static constexpr index capacity = 1024;
  alignas(64) P shift[capacity], scale[capacity], offset[capacity], tilt[capacity],
      level[capacity];

  void fill(const Job& j, index c0, index width, bool backward) {
    const auto round = [&](const double* from, P* to) {
      for (index c = 0; c < width; ++c) to[c] = P(from[c0 + c]);
    };
    round(j.shift, shift);
    round(j.scale, scale);
    round(j.offset, offset);
    if (!backward) return;
    round(j.tilt, tilt);
    round(j.level, level);
  }
};

template <class A, class T, class P, bool Weighted>
void apply_rows(const Job& job, const Block& b) {
  constexpr int N = A::N;
  using V = Vec<P, N>;
  constexpr index capacity = scratch_bytes / index(sizeof(T));
  alignas(64) T scratch[capacity];
  alignas(64) T scratch_residual[capacity];
  const Slope<P> slope(job.epilogue);
  const index length = b.inner_end - b.inner_begin;
  for (index o = b.outer_begin; o < b.outer_end; ++o)
    for (index c = b.channel_begin; c < b.channel_end; ++c) {
      A a;
      a.k.of_channel(job, c);
      for (index begin = 0, n; begin < length; begin += n) {
        const Pointers<T> p(job, o, b.inner_begin + begin, c);
        // Pieces end where lines of the output end, so that lines are written whole.
        n = length - begin;
        if (job.stream && n > capacity) n = capacity - index(offset_in_line(p.out) / sizeof(T));
        T* out = job.stream ? scratch : p.out;
        T* out_residual = job.stream && p.out_residual ? scratch_residual : p.out_residual;
        auto weight = [&](index i, auto part, index m) {
          if constexpr (Weighted) {
            return read<P, N, decltype(part)::value>(p.weights + i, m);
          } else {
            return V{};
          }
        };
        index i = 0;
        for (; i + N <= n; i += N)
          a.template at<false>(p, i, N, weight(i, std::false_type{}, N), slope, out,
                               out_residual);
        if (i < n)
          a.template at<true>(p, i, n - i, weight(i, std::true_type{}, n - i), slope, out,
                              out_residual);
        if (job.stream) {
          stream_out(reinterpret_cast<char*>(p.out), reinterpret_cast<const char*>(scratch),
                     std::size_t(n) * sizeof(T));
          if (p.out_residual)
            stream_out(reinterpret_cast<char*>(p.out_residual),
                       reinterpret_cast<const char*>(scratch_residual),
                       std::size_t(n) * sizeof(T));
        }
      }
    }
}

// `Tile` vectors of channels over rows [i0, i1); row i is written at out + (i - i0) * pitch.
template <class A, class T, class P, bool Weighted, int Tile, bool Part>
BN_INLINE void apply_tile(const Job& job, const CoefficientTable<P>& table, index c0, index o,
                          index i0, index i1, index c, index n, T* out, index pitch,
                          T* out_residual, index pitch_residual) {
  constexpr int N = A::N;
  using V = Vec<P, N>;
  const Slope<P> slope(job.epilogue);
  A a[Tile];
  BN_UNROLL
  for (int t = 0; t < Tile; ++t) a[t].k.template of_channels<Part>(table, c - c0 + t * N, n);
  Pointers<T> p(job, o, i0, c);
  for (index i = i0; i < i1; ++i, p.next_row(job)) {
    V w{};
    if constexpr (Weighted) w = splat<P, N>(*p.weights);
    BN_UNROLL
    for (int t = 0; t < Tile; ++t)
      a[t].template at<Part>(p, t * N, n, w, slope, out, out_residual);
    out += pitch;
    if (out_residual) out_residual += pitch_residual;
  }
}

template <class A, class T, class P, bool Weighted>
void apply_columns(const Job& job, const Block& b) {
  constexpr int N = A::N;
  constexpr int tile = 4;
  constexpr index capacity = scratch_bytes / index(sizeof(T));
  alignas(64) T scratch[capacity];
  alignas(64) T scratch_residual[capacity];
  // Rows whose distance is a power of two fall on the same cache sets, so few are open at once.
  constexpr index rows = 2;
  const index limit = job.stream ? capacity / rows : CoefficientTable<P>::capacity;
  CoefficientTable<P> table;
  for (index c0 = b.channel_begin; c0 < b.channel_end; c0 += limit) {
    const index width = c0 + limit < b.channel_end ? limit : b.channel_end - c0;
    table.fill(job, c0, width, A::backward);
    index step = capacity / width;
    if (step < rows) step = rows;
    for (index o = b.outer_begin; o < b.outer_end; ++o)
      for (index i0 = b.inner_begin; i0 < b.inner_end; i0 += step) {
        const index i1 = i0 + step < b.inner_end ? i0 + step : b.inner_end;
        const Pointers<T> p(job, o, i0, c0);
        T* out = job.stream ? scratch : p.out;
        T* out_residual = job.stream && p.out_residual ? scratch_residual : p.out_residual;
        const index pitch = job.stream ? width : job.out.inner;
        const index pitch_residual = job.stream ? width : job.out_residual.inner;
        auto second = [&](index c) { return out_residual ? out_residual + c : nullptr; };
        index c = 0;
        for (; c + tile * N <= width; c += tile * N)
          apply_tile<A, T, P, Weighted, tile, false>(job, table, c0, o, i0, i1, c0 + c, N, out + c, pitch,
                                                     second(c), pitch_residual);
        for (; c + N <= width; c += N)
          apply_tile<A, T, P, Weighted, 1, false>(job, table, c0, o, i0, i1, c0 + c, N, out + c, pitch,
                                                  second(c), pitch_residual);
        if (c < width)
          apply_tile<A, T, P, Weighted, 1, true>(job, table, c0, o, i0, i1, c0 + c, width - c, out + c,
                                                 pitch, second(c), pitch_residual);
        if (job.stream) {
          auto flush = [&](T* to, index row, const T* from) {
            const std::size_t bytes = std::size_t(width) * sizeof(T);
            if (row == width) {
              stream_out(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(from),
                         bytes * std::size_t(i1 - i0));
            } else {
              for (index i = 0; i < i1 - i0; ++i)
                stream_out(reinterpret_cast<char*>(to + i * row),
                           reinterpret_cast<const char*>(from + i * width), bytes);
            }
          };
          flush(p.out, job.out.inner, scratch);
          if (p.out_residual) flush(p.out_residual, job.out_residual.inner, scratch_residual);
        }
      }
  }
}

template <class T, class P, int E, bool Weighted, int Mode>
void apply(const Job& job, const Block& b) {
  using A = Application<T, P, E, Weighted, Mode>;
  if (job.rows)
    apply_rows<A, T, P, Weighted>(job, b);
  else
    apply_columns<A, T, P, Weighted>(job, b);
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
