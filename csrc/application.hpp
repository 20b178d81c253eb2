// An application turns elements of x into elements of y, or of grad_x, over rows or over columns.
// Included by bodies.hpp only, inside the namespace of an instruction set; nothing here may have
// external linkage.

template <class T, class P, int E, int Mode>
struct Application {
  static constexpr int N = sizeof(P) == 4 ? F : D;
  static constexpr bool backward = Mode != forward;
  static constexpr bool may_weigh = E == general;
  using V = Vec<P, N>;
  Coefficients<P, N, E, Mode> k;
  bool stream = false;  // whole vectors past the cache: `out` and out_residual are aligned

  template <bool Part>
  BN_INLINE void at(const Pointers<T>& p, index i, index n, V w, const Settings<P>& s, T* out,
                    T* out_residual) const {
    constexpr bool needs_z = Mode == forward || E != plain;
    V d{}, z{};
    if constexpr (needs_z || Mode == backward_batch) d = read<P, N, Part>(p.x + i, n) - k.shift;
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

template <class A, class T, class P>
void apply_rows(const Job& job, const Block& b) {
  constexpr int N = A::N;
  using V = Vec<P, N>;
  const Settings<P> settings(job);
  const index length = b.inner_end - b.inner_begin;
  for (index o = b.outer_begin; o < b.outer_end; ++o)
    for (index c = b.channel_begin; c < b.channel_end; ++c) {
      A a;
      a.k.of_channel(job, c);
      const Pointers<T> p(job, o, b.inner_begin, c);
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

// `Tile` vectors of channels from c on, over all rows; without weights.
template <class A, class T, class P, int Tile, bool Part>
BN_INLINE void apply_tile(const Job& job, const Block& b, const CoefficientTable<P, A::N>& table,
                          index o, index c, index n, bool stream) {
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
    BN_UNROLL
    for (int t = 0; t < Tile; ++t)
      a[t].template at<Part>(p, t * N, n, V{}, settings, out, out_residual);
    out += job.out.inner;
    if (out_residual) out_residual += job.out_residual.inner;
  }
}

// Columns [c, end) of one row.
template <class A, class T, class P>
BN_INLINE void apply_row(const Job& job, const Block& b, const CoefficientTable<P, A::N>& table,
                         index o, index i, index c, index end, bool stream) {
  constexpr int N = A::N;
  using V = Vec<P, N>;
  const Settings<P> settings(job);
  const Pointers<T> p(job, o, i, b.channel_begin);
  V w{};
  if constexpr (A::may_weigh)
    if (p.weights) w = splat<P, N>(*p.weights);
  A a;
  a.stream = stream;
  for (; c + N <= end; c += N) {
    table.get(c, a.k);
    a.template at<false>(p, c, N, w, settings, p.out, p.out_residual);
  }
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
  const CoefficientTable<P, N> table(job, b.channel_begin, width, A::backward);
  for (index o = b.outer_begin; o < b.outer_end; ++o) {
    const Pointers<T> p(job, o, b.inner_begin, b.channel_begin);
    const bool stream = before_stream(job, p.out, p.out_residual, width) == 0 &&
                        job.out.inner * index(sizeof(T)) % 64 == 0 &&
                        job.out_residual.inner * index(sizeof(T)) % 64 == 0;
    if constexpr (!A::may_weigh) {
      if (width <= tile * N) {  // registers hold the coefficients
        index c = 0;
        for (; c + tile * N <= width; c += tile * N)
          apply_tile<A, T, P, tile, false>(job, b, table, o, c, N, stream);
        for (; c + N <= width; c += N)
          apply_tile<A, T, P, 1, false>(job, b, table, o, c, N, stream);
        if (c < width) apply_tile<A, T, P, 1, true>(job, b, table, o, c, width - c, stream);
        continue;
      }
    }
    // Row by row, as memory has them; but where the first-level cache does not hold the
    // coefficients of a row, two share what it does hold.
    constexpr index held = 1024;
    const index together = width <= held ? 1 : 2;
    for (index first = b.inner_begin; first < b.inner_end; first += together) {
      const index last = smaller(b.inner_end, first + together);
      for (index c = 0; c < width; c += held)
        for (index i = first; i < last; ++i)
          apply_row<A, T, P>(job, b, table, o, i, c, smaller(width, c + held), stream);
    }
  }
}

template <class T, class P, int E, int Mode>
void apply(const Job& job, const Block& b) {
  using A = Application<T, P, E, Mode>;
  const Columns::Members forwards = {&Job::shift, &Job::scale, &Job::offset};
  const Columns::Members backwards = {&Job::shift, &Job::scale, &Job::offset, &Job::tilt,
                                      &Job::level};
  const Columns::Members& used = A::backward ? backwards : forwards;
  auto columns = [](const Columns& k) { apply_columns<A, T, P>(k.job, k.block); };
  auto rest = [&](const Block& part) { apply_columns<A, T, P>(job, part); };
  if (!job.rows)
    each_of_columns(job, b, &job.out, 4 * A::N, used, columns, rest);
  else if (!each_of_short_rows(job, b, job.out, used, columns))
    apply_rows<A, T, P>(job, b);
  if (job.stream) stream_end();
}
