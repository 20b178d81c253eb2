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
