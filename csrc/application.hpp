// An application turns elements of x into elements of y, or of grad_x, over rows or over columns.
// Included by bodies.hpp only, inside the namespace of an instruction set; nothing here may have
// external linkage.

template <class T, class P, int E, int Mode>
struct Application {
  static constexpr int N = sizeof(P) == 4 ? F : D;
  static constexpr bool backward = Mode != forward;
  static constexpr bool may_weigh = E == general;
  using V = Vec<P, N>;
  static constexpr bool needs_z = Mode == forward || E != plain;
  static constexpr bool needs_d = needs_z || Mode == backward_batch;
  using Values = Coefficients<P, N,
                              has_scale | (needs_d ? has_shift : 0) | (needs_z ? has_offset : 0) |
                                  (Mode == backward_batch ? has_tilt | has_level : 0)>;
  Values k;
  bool stream = false;  // whole vectors past the cache: `out` and out_residual are aligned

  template <bool Part>
  BN_INLINE void at(const Pointers<T>& p, index i, index n, V w, const Settings<P>& s, T* out,
                    T* out_residual) const {
    V d{}, z{};
    if constexpr (needs_d) d = read<P, N, Part>(p.x + i, n) - k.shift;
    if constexpr (needs_z) z = d * k.scale + k.offset;
    if constexpr (E == full || E == general) {
      if (E == full || p.residual) {
        const V r = read<P, N, Part>(p.residual + i, n);
        z = Mode == forward ? z + r : r;
      }
    }
    if constexpr (Mode == forward) {
      V y = z;
      if constexpr (E != plain) y = activate<E, P, N>(z, s);
      if constexpr (may_weigh)
        if (p.weights) y = where_weighted<P, N>(w, y);
      put<Part>(out + i, y, n);
    } else {
      V g = read<P, N, Part>(p.grad + i, n);
      if constexpr (E != plain) g = gradient<E, P, N>(z, g, s);
      if constexpr (E == full || E == general) {
        if (out_residual) {
          V gr = g;
          if constexpr (may_weigh)
            if (p.weights) gr = where_weighted<P, N>(w, gr);
          put<Part>(out_residual + i, gr, n);
        }
      }
      if constexpr (Mode == backward_batch) {
        if constexpr (E < curved) {
          g = (g - k.level) - d * k.tilt;
        } else if (s.batch_statistics) {
          if (may_weigh && p.weights)
            g = g - w * (k.level + d * k.tilt);
          else
            g = (g - k.level) - d * k.tilt;
        }
      }
      g = g * k.scale;
      if constexpr (may_weigh)
        if (p.weights) g = where_weighted<P, N>(w, g);
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

// How many of n values to write before those that go past the cache; n if none do.
template <class T>
index before_stream(const Job& job, const T* out, const T* out_residual, index n) {
  if (!job.stream || (out_residual && offset_in_line(out_residual) != offset_in_line(out))) return n;
  return smaller(n, values_to_line(reinterpret_cast<const char*>(out), sizeof(T)));
}

template <class A, class T, class P>
void apply_rows(const Job& job, const Block& b) {
  constexpr int N = A::N;
  using V = Vec<P, N>;
  const Settings<P> settings(job);
  const index length = b.inner_end - b.inner_begin;
  for (index b0 = b.channel_begin; b0 < b.channel_end; b0 += rows_together) {
    const index b1 = smaller(b.channel_end, b0 + rows_together);
    const OfRows<typename A::Values> table(job, b0, b1 - b0);
    for (index o = b.outer_begin; o < b.outer_end; ++o) {
      Pointers<T> p(job, o, b.inner_begin, b0);
      for (index c = b0; c < b1; ++c, p.next_channel(job)) {
        A a;
        table.get(c - b0, a.k);
        auto some = [&](index i, auto part, index n) {
          constexpr bool Part = decltype(part)::value;
          V w{};
          if constexpr (A::may_weigh)
            if (p.weights) w = read<P, N, Part>(p.weights + i, n);
          a.template at<Part>(p, i, n, w, settings, p.out, p.out_residual);
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
  }
}

// Rows of N values or more that follow one another without a gap are one long row, in which vectors
// begin where cache lines do, and may hold the end of one channel and the beginning of the next.
template <class A, class T, class P>
void apply_joined_rows(const Job& job, const Block& b) {
  constexpr int N = A::N;
  using V = Vec<P, N>;
  const Settings<P> settings(job);
  const index length = b.inner_end;
  // Hardware follows rows that are read; but lines to be written have to be there, too.
  const index ahead = job.far ? 2048 / index(sizeof(T)) : 0;
  for (index b0 = b.channel_begin; b0 < b.channel_end; b0 += rows_together) {
    const index b1 = smaller(b.channel_end, b0 + rows_together), all = (b1 - b0) * length;
    const OfRows<typename A::Values> table(job, b0, b1 - b0);
    for (index o = b.outer_begin; o < b.outer_end; ++o) {
      const Pointers<T> p(job, o, 0, b0);
      A a;
      auto some = [&](auto part, const A& with, index i, index n) {
        with.template at<decltype(part)::value>(p, i, n, V{}, settings, p.out, p.out_residual);
      };
      using Whole = std::false_type;
      using Part = std::true_type;
      index i = smaller(values_to_line(reinterpret_cast<const char*>(p.out), sizeof(T)), length);
      table.get(0, a.k);
      for (index k = 0; k < i; k += N) some(Part{}, a, k, smaller(N, i - k));
      a.stream = before_stream(job, p.out + i, p.out_residual + (p.out_residual ? i : 0), 1) == 0;
      index left = length - i;  // of channel c
      for (index c = 0;;) {
        const index end = i + left / N * N;
        for (; i + 2 * N <= end; i += 2 * N) {
          if (ahead && !a.stream) prefetch<2 * N * index(sizeof(T))>(p.out + i + ahead);
          some(Whole{}, a, i, N);
          some(Whole{}, a, i + N, N);
        }
        if (i < end) {
          some(Whole{}, a, i, N);
          i += N;
        }
        left %= N;
        if (i + N > all) break;
        A next, both;
        next.stream = both.stream = a.stream;
        table.get(++c, next.k);
        if (left) {
          both.k.join(a.k, next.k, left);
          some(Whole{}, both, i, N);
          i += N;
          left -= N;
        }
        left += length;
        a = next;
      }
      if (i < all) some(Part{}, a, i, all - i);
    }
  }
}

// `Tile` vectors of channels from c on, over all rows; without weights.
template <class A, class T, class P, int Tile, bool Part>
BN_INLINE void apply_tile(const Job& job, const Block& b,
                          const OfColumns<typename A::Values>& table, index o, index ahead, index c,
                          index n, bool stream) {
  constexpr int N = A::N;
  using V = Vec<P, N>;
  const Settings<P> settings(job);
  A a[Tile];
  BN_UNROLL
  for (int t = 0; t < Tile; ++t) {
    table.get(c + t * N, a[t].k);
    a[t].stream = stream;
  }
  Pointers<T> p(job, o, b.inner_begin, b.channel_begin + c);
  T *out = p.out, *out_residual = p.out_residual;
  for (index i = b.inner_begin; i < b.inner_end; ++i, p.next_row(job)) {
    if (ahead) {
      prefetch<Tile * N * index(sizeof(T))>(p.x + ahead * job.x.inner);
      if constexpr (A::backward)
        prefetch<Tile * N * index(sizeof(T))>(p.grad + ahead * job.grad.inner);
      if (!stream) prefetch<Tile * N * index(sizeof(T))>(out + ahead * job.out.inner);
    }
    BN_UNROLL
    for (int t = 0; t < Tile; ++t)
      a[t].template at<Part>(p, t * N, n, V{}, settings, out, out_residual);
    out += job.out.inner;
    if (out_residual) out_residual += job.out_residual.inner;
  }
}

// Columns [c, end) of one row.
template <class A, class T, class P>
BN_INLINE void apply_row(const Job& job, const Block& b,
                         const OfColumns<typename A::Values>& table, index o, index i,
                         index ahead, index c, index end, bool stream) {
  constexpr int N = A::N;
  using V = Vec<P, N>;
  const Settings<P> settings(job);
  const Pointers<T> p(job, o, i, b.channel_begin);
  V w{};
  if constexpr (A::may_weigh)
    if (p.weights) w = splat<P, N>(*p.weights);
  A a;
  a.stream = stream;
  constexpr index line = 64 / index(sizeof(T)), step = N > line ? N : line;
  auto vector = [&](index c) {
    table.get(c, a.k);
    a.template at<false>(p, c, N, w, settings, p.out, p.out_residual);
  };
  for (; c + step <= end; c += step) {
    if (ahead) {
      prefetch<step * index(sizeof(T))>(p.x + c + ahead * job.x.inner);
      if constexpr (A::backward)
        prefetch<step * index(sizeof(T))>(p.grad + c + ahead * job.grad.inner);
      if (!stream) prefetch<step * index(sizeof(T))>(p.out + c + ahead * job.out.inner);
    }
    BN_UNROLL
    for (index k = 0; k < step; k += N) vector(c + k);
  }
  for (; c + N <= end; c += N) vector(c);
  if (c < end) {
    table.get(c, a.k);
    a.template at<true>(p, c, end - c, w, settings, p.out, p.out_residual);
  }
}

template <class A, class T, class P>
void apply_columns(const Job& job, const Block& b) {
  constexpr int N = A::N;
  constexpr int tile = 4;
  const index width = b.channel_end - b.channel_begin;
  const OfColumns<typename A::Values> table(job, b.channel_begin, width);
  const index ahead = rows_ahead(job, 8192);
  for (index o = b.outer_begin; o < b.outer_end; ++o) {
    const Pointers<T> p(job, o, b.inner_begin, b.channel_begin);
    const bool stream = before_stream(job, p.out, p.out_residual, width) == 0 &&
                        job.out.inner * index(sizeof(T)) % 64 == 0 &&
                        job.out_residual.inner * index(sizeof(T)) % 64 == 0;
    if constexpr (!A::may_weigh) {
      if (width <= tile * N) {  // registers hold the coefficients
        index c = 0;
        for (; c + tile * N <= width; c += tile * N)
          apply_tile<A, T, P, tile, false>(job, b, table, o, ahead, c, N, stream);
        for (; c + N <= width; c += N)
          apply_tile<A, T, P, 1, false>(job, b, table, o, ahead, c, N, stream);
        if (c < width) apply_tile<A, T, P, 1, true>(job, b, table, o, ahead, c, width - c, stream);
        continue;
      }
    }
    for (index c = 0; c < width; c += held)
      for (index i = b.inner_begin; i < b.inner_end; ++i)
        apply_row<A, T, P>(job, b, table, o, i, ahead, c, smaller(width, c + held), stream);
  }
}

template <class T, class P, int E, int Mode>
void apply(const Job& job, const Block& b) {
  using A = Application<T, P, E, Mode>;
  const Used used(typename A::Values{});
  auto columns = [](const Columns& k) { apply_columns<A, T, P>(k.job, k.block); };
  auto rest = [&](const Block& part) { apply_columns<A, T, P>(job, part); };
  const index channels = b.channel_end - b.channel_begin;
  if (!job.rows)
    each_of_columns(job, b, &job.out, channels <= 4 * A::N ? 4 * A::N : 256, used, columns, rest);
  else if (each_of_short_rows(job, b, job.out, used, columns))
    ;
  else if (job.dense && b.inner_end - b.inner_begin == job.out.channel && job.out.channel >= A::N)
    apply_joined_rows<A, T, P>(job, b);
  else
    apply_rows<A, T, P>(job, b);
  if (job.stream) stream_end();
}
