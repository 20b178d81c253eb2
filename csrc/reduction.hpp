// A reduction makes two float64 sums per channel, over rows or over columns. Included by bodies.hpp
// only, inside the namespace of an instruction set; nothing here may have external linkage.

// Sums are float64, or float32 over runs of about this many vectors, of which only the sums go to float64:
// half the instructions, and digits enough for a training step (docs/numerics.md).
constexpr index run_length = 16;

template <class T, class P, int E, int Mode>
struct Reduction {
  static constexpr bool runs = sizeof(P) == 4;
  static constexpr int N = runs ? F : D;
  static constexpr bool reads_grad = Mode != forward;
  static constexpr bool may_weigh = E == general;
  static constexpr bool needs_z = reads_grad && E != plain, plain_sums = E == plain;
  using S = P;
  using V = Vec<S, N>;
  using Values = Coefficients<S, N, has_shift | (needs_z ? has_scale | has_offset : 0)>;

  Values k;

  // Add the elements at p[i], whose weight is w. Not all of them may count: of columns only the first
  // n exist, and nobody reads the others; the first n, or the last n, of a row are what is left of it.
  enum Which : int { all, columns, first_of_row, last_of_row };
  template <int Count>
  BN_INLINE void add(const Pointers<T>& p, index i, index n, V w, const Settings<S>& s, V& first,
                     V& second) const {
    constexpr bool part = Count == columns || Count == first_of_row;
    auto counted = [&](V v) {
      if constexpr (may_weigh)
        if (p.weights) v = where_weighted<S, N>(w, v);
      if constexpr (Count == first_of_row) v = join_lanes<S, N>(v, V{}, n);
      if constexpr (Count == last_of_row) v = join_lanes<S, N>(V{}, v, N - n);
      return v;
    };
    const V x = read<S, N, part>(p.x + i, n);
    V d = x - k.shift;
    if constexpr (Mode == forward) {
      d = counted(d);
      const V weighted = may_weigh ? w * d : d;  // moments are general only with weights
      first += weighted;
      second += weighted * d;
    } else {
      V g = read<S, N, part>(p.grad + i, n);
      if constexpr (needs_z) {
        V z = d * k.scale + k.offset;
        if constexpr (E == full || E == general)
          if (E == full || p.residual) z = read<S, N, part>(p.residual + i, n);  // y in its place
        g = gradient<E, S, N>(z, g, s);
      }
      if constexpr (may_weigh)
        if (p.weights) d = where_weighted<S, N>(w, d);
      g = counted(g);
      first += g;
      second += g * d;
    }
  }
};

template <class R, class T>
void reduce_rows(const Job& job, const Block& b, double* out1, double* out2) {
  using S = typename R::S;
  using V = typename R::V;
  constexpr int N = R::N;
  constexpr index together = 32;  // channels whose sums are open at once
  // Two chains per sum: an addition takes 3-4 cycles, and one iteration issues four of them.
  struct Sums {
    V first[2], second[2];
  };
  const Settings<S> settings(job);
  const index length = b.inner_end - b.inner_begin;
  const index whole = length / N * N, rest = length - whole;
  const index iterations = (length + 2 * N - 1) / (2 * N);
  const index at_most = R::reads_grad ? run_length : run_length / 2;
  const index run = R::runs ? at_most * 2 * N : length;
  const index rows_in_run = iterations < at_most ? at_most / iterations : 1;
  for (index c0 = b.channel_begin; c0 < b.channel_end; c0 += together) {
    const index c1 = c0 + together < b.channel_end ? c0 + together : b.channel_end;
    Sums sums[together] = {};
    Vec<double, D> total1[together] = {}, total2[together] = {};
    auto flush = [&](index c, Sums& s) {
      total1[c] += fold<N>(s.first[0] + s.first[1]);
      total2[c] += fold<N>(s.second[0] + s.second[1]);
      s.first[0] = s.first[1] = s.second[0] = s.second[1] = V{};
    };
    const OfRows<typename R::Values> table(job, c0, c1 - c0);
    index rows = 0;
    for (index o = b.outer_begin; o < b.outer_end; ++o) {
      const bool ahead = job.far && o + 1 < b.outer_end;
      Pointers<T> p(job, o, b.inner_begin, c0);
      for (index c = c0; c < c1; ++c, p.next_channel(job)) {
        R r;
        table.get(c - c0, r.k);
        auto add = [&](index i, auto count, index n, V& first, V& second) {
          constexpr int Count = decltype(count)::value;
          V w{};
          if constexpr (R::may_weigh)
            if (p.weights) w = read<S, N, Count == R::first_of_row>(p.weights + i, n);
          r.template add<Count>(p, i, n, w, settings, first, second);
        };
        using All = std::integral_constant<int, R::all>;
        auto look_ahead = [&](index i) {
          prefetch<2 * N * index(sizeof(T))>(p.x + i + job.x.outer);
          if constexpr (R::reads_grad)
            prefetch<2 * N * index(sizeof(T))>(p.grad + i + job.grad.outer);
        };
        Sums s = sums[c - c0];
        index i = 0;
        for (index end = smaller(run, whole);; end = smaller(end + run, whole)) {
          for (; i + 2 * N <= end; i += 2 * N) {
            if (ahead) look_ahead(i);
            add(i, All{}, N, s.first[0], s.second[0]);
            add(i + N, All{}, N, s.first[1], s.second[1]);
          }
          if (end == whole) break;
          if (R::runs) flush(c - c0, s);
        }
        if (ahead && i < length) look_ahead(i);
        if (i < whole) add(i, All{}, N, s.first[0], s.second[0]);
        if (rest && whole)
          add(length - N, std::integral_constant<int, R::last_of_row>{}, rest, s.first[1], s.second[1]);
        else if (rest)
          add(0, std::integral_constant<int, R::first_of_row>{}, rest, s.first[1], s.second[1]);
        if (R::runs && iterations >= at_most) flush(c - c0, s);
        sums[c - c0] = s;
      }
      if (R::runs && iterations < at_most && ++rows == rows_in_run) {
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

// `Tile` vectors of channels side by side from c on, over some rows (`Rows`, or `rows` where that is
// zero), added to sum1 and sum2, or written there if they begin. `n` channels exist, if `Part`.
template <class R, class T, int Tile, int Rows, bool Part>
BN_INLINE void reduce_tile(const Job& job, const OfColumns<typename R::Values>& table,
                           Pointers<T> p, index rows, index ahead, index c, index n, bool begins,
                           typename R::S* sum1, typename R::S* sum2) {
  using S = typename R::S;
  using V = typename R::V;
  constexpr int N = R::N;
  const Settings<S> settings(job);
  R r[Tile];
  V first[Tile], second[Tile];
  BN_UNROLL
  for (int t = 0; t < Tile; ++t) {
    table.get(c + t * N, r[t].k);
    first[t] = begins ? V{} : load<S, N>(sum1 + t * N);
    second[t] = begins ? V{} : load<S, N>(sum2 + t * N);
  }
  for (index i = 0; i < (Rows ? Rows : rows); ++i, p.next_row(job)) {
    if (ahead) {
      prefetch<Tile * N * index(sizeof(T))>(p.x + ahead * job.x.inner);
      if constexpr (R::reads_grad)
        prefetch<Tile * N * index(sizeof(T))>(p.grad + ahead * job.grad.inner);
    }
    V w{};
    if constexpr (R::may_weigh)
      if (p.weights) w = splat<S, N>(*p.weights);
    BN_UNROLL
    for (int t = 0; t < Tile; ++t)
      r[t].template add<Part ? R::columns : R::all>(p, t * N, n, w, settings, first[t], second[t]);
  }
  BN_UNROLL
  for (int t = 0; t < Tile; ++t) {
    store<N>(sum1 + t * N, first[t]);
    store<N>(sum2 + t * N, second[t]);
  }
}

template <class R, class T>
void reduce_columns(const Job& job, const Block& b, double* out1, double* out2) {
  using S = typename R::S;
  constexpr int N = R::N, tile = 4;
  const OfColumns<typename R::Values> table(job, b.channel_begin,
                                                   b.channel_end - b.channel_begin);
  alignas(64) S sum1[held + N], sum2[held + N];
  // Of the gradients' sums 1e-5 is promised, of statistics 1e-6, whatever the values: where all of a
  // run round the same way, each doubling of its length doubles the error.
  const index run = !R::runs         ? b.inner_end - b.inner_begin
                    : R::reads_grad ? 2 * run_length
                                    : run_length / 2;
  for (index c0 = b.channel_begin; c0 < b.channel_end; c0 += held) {
    const index width = smaller(held, b.channel_end - c0), at = c0 - b.channel_begin;
    const bool narrow = width <= tile * N;  // registers hold the sums of a run
    // Rows that tiles pass over together: few, as hardware follows few streams from afar; but where
    // sums are float64, as many as the first-level cache holds.
    const index together = narrow ? run : !R::runs ? 16 + 8192 / width : job.far ? 2 : 4;
    const index ahead = narrow || R::runs ? rows_ahead(job, 16384) : job.far ? together : 0;
    for (index o = b.outer_begin; o < b.outer_end; ++o)
      for (index i0 = b.inner_begin; i0 < b.inner_end; i0 += run) {
        const index i1 = smaller(b.inner_end, i0 + run);
        for (index i = i0; i < i1; i += together) {
          const index rows = smaller(together, i1 - i);
          auto add = [&](auto tiled, auto fixed, auto part, index c, index n) {
            reduce_tile<R, T, decltype(tiled)::value, decltype(fixed)::value, decltype(part)::value>(
                job, table, Pointers<T>(job, o, i, c0 + c), rows, ahead, at + c, n, i == i0,
                sum1 + c, sum2 + c);
          };
          using Two = std::integral_constant<int, 2>;
          using Four = std::integral_constant<int, 4>;
          using Any = std::integral_constant<int, 0>;
          using One = std::integral_constant<int, 1>;
          using Tile = std::integral_constant<int, tile>;
          index c = 0;
          auto tiles = [&](auto fixed) {
            for (; c + tile * N <= width; c += tile * N) add(Tile{}, fixed, std::false_type{}, c, N);
          };
          if constexpr (R::runs && R::plain_sums) {  // the others have more to do for each row
            if (rows == 4)
              tiles(Four{});
            else if (rows == 2)
              tiles(Two{});
            else
              tiles(Any{});
          } else {
            tiles(Any{});
          }
          for (; c + N <= width; c += N) add(One{}, Any{}, std::false_type{}, c, N);
          if (c < width) add(One{}, Any{}, std::true_type{}, c, width - c);
        }
        for (index c = 0; c < width; ++c) {
          out1[at + c] += sum1[c];
          out2[at + c] += sum2[c];
        }
      }
  }
}

template <class T, class P, int E, int Mode>
void reduce(const Job& job, const Block& b, double* out1, double* out2) {
  using R = Reduction<T, P, E, Mode>;
  auto clear = [](double* out, index n) { std::memset(out, 0, std::size_t(n) * sizeof(double)); };
  const Used used(typename R::Values{});
  auto columns = [&](const Columns& k) {
    alignas(64) double sums1[widest], sums2[widest];
    clear(sums1, k.block.channel_end);
    clear(sums2, k.block.channel_end);
    reduce_columns<R, T>(k.job, k.block, sums1, sums2);
    k.each_column([&](index v, index c) {
      out1[c - b.channel_begin] += sums1[v];
      out2[c - b.channel_begin] += sums2[v];
    });
  };
  auto rest = [&](const Block& part) {
    const index at = part.channel_begin - b.channel_begin;
    reduce_columns<R, T>(job, part, out1 + at, out2 + at);
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
