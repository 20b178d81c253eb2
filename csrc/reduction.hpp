// A reduction makes two float64 sums per channel, over rows or over columns. Included by bodies.hpp
// only, inside the namespace of an instruction set; nothing here may have external linkage.

// Moments are summed in float64 throughout. The sums of the backward pass need fewer digits (1e-5
// of their norm is promised), so where the last step runs in float32 they are taken in float32 over
// runs of 16 vectors, and only a run's sum goes to float64: half the instructions.
constexpr index run_length = 16;

template <class T, class P, int E, int Mode>
struct Reduction {
  static constexpr bool runs = Mode != forward && sizeof(P) == 4;
  using S = typename std::conditional<runs, float, double>::type;
  static constexpr int N = runs ? F : D;
  static constexpr bool reads_grad = Mode != forward;
  static constexpr bool may_weigh = E == general;
  using V = Vec<S, N>;

  V center;
  Coefficients<S, N, E, forward> affine;  // only where z is needed: backward with an epilogue

  // The contribution of n (or N) elements at p[i]; `w` is their weight.
  template <bool Part, bool Rows>
  BN_INLINE void add(const Pointers<T>& p, index i, index n, V w, const Settings<S>& s, V& first,
                     V& second) const {
    const V x = read<S, N, Part>(p.x + i, n);
    V d = x - center;
    if constexpr (may_weigh)
      if (p.weights) d = where_weighted<S, N>(w, d);
    if constexpr (Mode == forward) {
      // Lanes past the end hold 0 - center; in columns they are dropped with their channel.
      if constexpr (Part && Rows) d = first_lanes<S, N>(d, n);
      const V weighted = may_weigh ? w * d : d;  // moments are general only with weights
      first += weighted;
      second += weighted * d;
    } else {
      V g = read<S, N, Part>(p.grad + i, n);
      if constexpr (E != plain) {
        V z = (x - affine.shift) * affine.scale + affine.offset;
        if constexpr (E == full || E == general)
          if (E == full || p.residual) z = read<S, N, Part>(p.residual + i, n);  // y in its place
        g = gradient<E, S, N>(z, g, s);
      }
      if constexpr (may_weigh)
        if (p.weights) g = where_weighted<S, N>(w, g);
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

template <class R, class T>
void reduce_rows(const Job& job, const Block& b, double* out1, double* out2) {
  using S = typename R::S;
  using V = typename R::V;
  constexpr int N = R::N;
  constexpr index together = 16;  // channels whose sums are open at once: 4 KiB of them
  // Two chains per sum: an addition takes 3-4 cycles, and one iteration issues four of them.
  struct Sums {
    V first[2], second[2];
  };
  const Settings<S> settings(job);
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
          if constexpr (R::may_weigh)
            if (p.weights) return read<S, N, decltype(part)::value>(p.weights + i, n);
          return V{};
        };
        using Whole = std::false_type;
        using Part = std::true_type;
        Sums s = sums[c - c0];
        for (index begin = 0; begin < length; begin += run) {
          const index end = length - begin > run ? begin + run : length;
          index i = begin;
          for (; i + 2 * N <= end; i += 2 * N) {
            r.template add<false, true>(p, i, N, weight(i, Whole{}, N), settings, s.first[0],
                                        s.second[0]);
            r.template add<false, true>(p, i + N, N, weight(i + N, Whole{}, N), settings, s.first[1],
                                        s.second[1]);
          }
          if (i + N <= end) {
            r.template add<false, true>(p, i, N, weight(i, Whole{}, N), settings, s.first[0],
                                        s.second[0]);
            i += N;
          }
          if (i < end) {
            const index n = end - i;
            r.template add<true, true>(p, i, n, weight(i, Part{}, n), settings, s.first[1],
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
template <class R, class T, int Tile, bool Part>
BN_INLINE void reduce_tile(const Job& job, index o, index i0, index i1, index ahead, index c,
                           index n, double* out1, double* out2) {
  using S = typename R::S;
  using V = typename R::V;
  constexpr int N = R::N;
  const Settings<S> settings(job);
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
    if constexpr (R::may_weigh)
      if (p.weights) w = splat<S, N>(*p.weights);
    BN_UNROLL
    for (int t = 0; t < Tile; ++t)
      r[t].template add<Part, false>(p, t * N, n, w, settings, first[t], second[t]);
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

template <class R, class T, int Tile>
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
        reduce_tile<R, T, Tile, false>(job, o, i0, i1, ahead, b.channel_begin + c, N,
                                                 out1 + c, out2 + c);
      for (; c + 4 * N <= channels; c += 4 * N)
        reduce_tile<R, T, 4, false>(job, o, i0, i1, ahead, b.channel_begin + c, N,
                                              out1 + c, out2 + c);
      for (; c + N <= channels; c += N)
        reduce_tile<R, T, 1, false>(job, o, i0, i1, ahead, b.channel_begin + c, N, out1 + c,
                                              out2 + c);
      if (c < channels)
        reduce_tile<R, T, 1, true>(job, o, i0, i1, ahead, b.channel_begin + c,
                                             channels - c, out1 + c, out2 + c);
    }
}

template <class T, class P, int E, int Mode>
void reduce(const Job& job, const Block& b, double* out1, double* out2) {
  using R = Reduction<T, P, E, Mode>;
  // Three registers a vector of channels: 8 of them fill 32 registers, 4 of them 16.
  constexpr int tile = D == 8 && E < curved ? 8 : 4;
  auto clear = [](double* out, index n) { std::memset(out, 0, std::size_t(n) * sizeof(double)); };
  const Columns::Members alone = {&Job::center};
  const Columns::Members with_z = {&Job::center, &Job::shift, &Job::scale, &Job::offset};
  const Columns::Members& used = E != plain && Mode != forward ? with_z : alone;
  auto columns = [&](const Columns& k) {
    alignas(64) double sums1[widest], sums2[widest];
    clear(sums1, k.block.channel_end);
    clear(sums2, k.block.channel_end);
    reduce_columns<R, T, tile>(k.job, k.block, sums1, sums2);
    k.each_column([&](index v, index c) {
      out1[c - b.channel_begin] += sums1[v];
      out2[c - b.channel_begin] += sums2[v];
    });
  };
  auto rest = [&](const Block& part) {
    const index at = part.channel_begin - b.channel_begin;
    reduce_columns<R, T, tile>(job, part, out1 + at, out2 + at);
  };
  clear(out1, b.channel_end - b.channel_begin);
  clear(out2, b.channel_end - b.channel_begin);
  if (!job.rows) {
    // Not cut where lines begin: the order of summation should not depend on an address.
    each_of_columns(job, b, nullptr, 64, used, columns, rest);
  } else if (!each_of_short_rows(job, b, job.x, used, columns)) {
    reduce_rows<R, T>(job, b, out1, out2);
  }
}
