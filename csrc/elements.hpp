// What reductions and applications share: how elements are read and written, what is asked of them,
// and the values of each channel. Included by bodies.hpp only, inside the namespace of an instruction
// set; nothing here may have external linkage.

// A reduction adds up the moments about `center`, or the two sums of the backward pass; an
// application writes y, or grad_x with batch statistics, or grad_x with fixed ones. Curved
// and general applications ask a job which of the two last it is, and are compiled as the first.
enum : int { forward = 0, backward_batch = 1, backward_fixed = 2 };

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

  BN_INLINE void next_channel(const Job& j) {
    x += j.x.channel;
    if (grad) grad += j.grad.channel;
    if (residual) residual += j.residual.channel;
    if (out) out += j.out.channel;
    if (out_residual) out_residual += j.out_residual.channel;
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

// Which of a job's values per channel a loop needs.
enum : int { has_shift = 1, has_scale = 2, has_offset = 4, has_tilt = 8, has_level = 16 };

// These values as vectors: one value in all lanes (rows), or N channels side by side (columns).
template <class P_, int N_, int Needs>
struct Coefficients {
  using P = P_;
  static constexpr int N = N_;
  static constexpr index kinds = (Needs & 1) + (Needs >> 1 & 1) + (Needs >> 2 & 1) +
                                 (Needs >> 3 & 1) + (Needs >> 4 & 1);
  Vec<P, N> shift, scale, offset, tilt, level;

  template <class Get>
  BN_INLINE void take(Get get) {  // get(which values, how many kinds came before them)
    int kind = 0;
    if constexpr (Needs & has_shift) shift = get(&Job::shift, kind++);
    if constexpr (Needs & has_scale) scale = get(&Job::scale, kind++);
    if constexpr (Needs & has_offset) offset = get(&Job::offset, kind++);
    if constexpr (Needs & has_tilt) tilt = get(&Job::tilt, kind++);
    if constexpr (Needs & has_level) level = get(&Job::level, kind++);
  }

  // a's in the first n lanes, b's in the others.
  BN_INLINE void join(const Coefficients& a, const Coefficients& b, index n) {
    if constexpr (Needs & has_shift) shift = join_lanes<P, N>(a.shift, b.shift, n);
    if constexpr (Needs & has_scale) scale = join_lanes<P, N>(a.scale, b.scale, n);
    if constexpr (Needs & has_offset) offset = join_lanes<P, N>(a.offset, b.offset, n);
    if constexpr (Needs & has_tilt) tilt = join_lanes<P, N>(a.tilt, b.tilt, n);
    if constexpr (Needs & has_level) level = join_lanes<P, N>(a.level, b.level, n);
  }
};

// The coefficients of a block's channels, rounded to the type of the loop once for all its rows: those
// of `Group` channels side by side (N for columns, 1 for rows), then those of the next. In arrays of
// their own, a power of two long, they would compete with one another, and with what is read, for the
// same lines of the first-level cache.
template <class K, int Group, index Most>
struct CoefficientTable {
  using P = typename K::P;
  static constexpr int N = K::N;
  static constexpr index kinds = K::kinds;
  alignas(64) P values[kinds * (Most + Group)];

  CoefficientTable(const Job& j, index c0, index channels) {
    const double* from[kinds];
    K().take([&](PerChannel which, int kind) {
      from[kind] = j.*which + c0;
      return Vec<P, N>{};
    });
    for (index k = 0; k < kinds; ++k)
      for (index c = 0; c < channels; c += Group) {
        P* to = values + c * kinds + k * Group;
        if (channels - c >= Group)
          for (int i = 0; i < Group; ++i) to[i] = P(from[k][c + i]);
        else
          for (index i = 0; i < Group; ++i) to[i] = i < channels - c ? P(from[k][c + i]) : P(0);
      }
  }

  // Of channel c in all lanes, or of N channels from c on, a multiple of N.
  BN_INLINE void get(index c, K& k) const {
    const P* at = values + c * kinds;
    k.take([&](PerChannel, int kind) {
      if constexpr (Group == 1) {
        return splat<P, N>(at[kind]);
      } else {
        return load<P, N>(at + kind * N);
      }
    });
  }
};

template <class K>
using OfColumns = CoefficientTable<K, K::N, widest>;
constexpr index rows_together = 512;  // rows of as many channels, one after the other
template <class K>
using OfRows = CoefficientTable<K, 1, rows_together>;

// Ask for what will be read soon. Hardware follows a stream of neighbouring lines, but to it every page
// and every jump to another row begins a new one.
template <index Bytes>
BN_INLINE void prefetch(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(p, 0, 2);
  // Not a loop: GCC takes one that only prefetches for one that does nothing.
  if constexpr (Bytes > 64) prefetch<Bytes - 64>(static_cast<const char*>(p) + 64);
#else
  (void)p;
#endif
}

constexpr index held = 1024;  // columns whose sums, or coefficients, the first-level cache holds

// How many rows ahead to ask for: so many bytes, and not many rows. None of an array that repeats one.
static inline index rows_ahead(const Job& j, index bytes) {
  const index step = j.x.inner * size_of(j.dtype), row = step < 0 ? -step : step;
  return !j.far || row == 0 ? 0 : row > bytes ? 1 : smaller(16, bytes / row);
}
