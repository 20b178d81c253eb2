// Fixed-width vectors, whatever the instruction set: GNU vector extensions, which GCC and Clang
// lower to the target's registers (and split where they are narrower), with plain arrays where the
// compiler has none. Included by bodies.hpp only, inside a namespace of its own per instruction set;
// nothing here may have external linkage, or the linker could hand AVX-512 code to an older machine.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define BN_AVX512 1
#endif

// Lanes of float32 in a vector of the last step, and of float64 in a vector of the sums.
#if defined(BN_AVX512)
constexpr int F = 16, D = 8;
#elif defined(__AVX2__)
constexpr int F = 8, D = 4;
#else
constexpr int F = 4, D = 4;
#endif

#if defined(__GNUC__) || defined(__clang__)
#define BN_INLINE inline __attribute__((always_inline))
#define BN_APART static __attribute__((noinline))
#define BN_UNROLL _Pragma("GCC unroll 8")

template <class E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(sizeof(E) * N)));
};
template <class E, int N>
using Vec = typename VectorOf<E, N>::type;

template <class To, class From>
BN_INLINE To convert(From v) {
#if defined(BN_AVX512)
  // GCC 12 splits these two into halves of 256 bits and puts the halves together again.
  if constexpr (std::is_same<To, Vec<double, 8>>::value && std::is_same<From, Vec<float, 8>>::value)
    return (To)_mm512_cvtps_pd((__m256)v);
  else if constexpr (std::is_same<To, Vec<float, 8>>::value &&
                     std::is_same<From, Vec<double, 8>>::value)
    return (To)_mm512_cvtpd_ps((__m512d)v);
  else
#endif
    return __builtin_convertvector(v, To);
}
#else
#define BN_INLINE inline
#define BN_APART static
#define BN_UNROLL

template <class E, int N>
struct Vec {
  E lane[N];
  E& operator[](int i) { return lane[i]; }
  E operator[](int i) const { return lane[i]; }
  template <class Op>
  static Vec map(const Vec& a, const Vec& b, Op op) {
    Vec r;
    for (int i = 0; i < N; ++i) r.lane[i] = op(a.lane[i], b.lane[i]);
    return r;
  }
  friend Vec operator+(const Vec& a, const Vec& b) {
    return map(a, b, [](E p, E q) { return E(p + q); });
  }
  friend Vec operator-(const Vec& a, const Vec& b) {
    return map(a, b, [](E p, E q) { return E(p - q); });
  }
  friend Vec operator*(const Vec& a, const Vec& b) {
    return map(a, b, [](E p, E q) { return E(p * q); });
  }
  friend Vec operator/(const Vec& a, const Vec& b) {
    return map(a, b, [](E p, E q) { return E(p / q); });
  }
  Vec& operator+=(const Vec& b) { return *this = *this + b; }
};
#endif

template <class V, class E, int N>
BN_INLINE V load_raw(const E* p) {
  V v;
  std::memcpy(&v, p, sizeof(E) * N);
  return v;
}

template <class P, int N>
BN_INLINE Vec<P, N> splat(double value) {
#if defined(__GNUC__) || defined(__clang__)
  return P(value) - Vec<P, N>{};
#else
  Vec<P, N> v;
  for (int i = 0; i < N; ++i) v[i] = P(value);
  return v;
#endif
}

// ---- elements of type T as N lanes of P ---------------------------------------------------------

template <class P, int N, class T>
struct Lanes {  // scalar fallback: float16 without hardware, and compilers without vectors
  static BN_INLINE Vec<P, N> load(const T* p) {
    P lane[N];
    for (int i = 0; i < N; ++i) lane[i] = P(widen(p[i]));
    return load_raw<Vec<P, N>, P, N>(lane);
  }
  static BN_INLINE void store(T* p, Vec<P, N> v) {
    P lane[N];
    std::memcpy(lane, &v, sizeof(lane));
    for (int i = 0; i < N; ++i) narrow(lane[i], p + i);
  }
};

#if defined(__GNUC__) || defined(__clang__)
template <class P, int N>
struct Lanes<P, N, P> {
  static BN_INLINE Vec<P, N> load(const P* p) { return load_raw<Vec<P, N>, P, N>(p); }
  static BN_INLINE void store(P* p, Vec<P, N> v) { std::memcpy(p, &v, sizeof(v)); }
};

template <int N>
struct Lanes<double, N, float> {
  static BN_INLINE Vec<double, N> load(const float* p) {
    return convert<Vec<double, N>>(load_raw<Vec<float, N>, float, N>(p));
  }
  static BN_INLINE void store(float* p, Vec<double, N> v) {
    const Vec<float, N> f = convert<Vec<float, N>>(v);
    std::memcpy(p, &f, sizeof(f));
  }
};

template <int N>
BN_INLINE Vec<float, N> load_bfloat16(const bfloat16* p) {
  using Bits = Vec<std::uint32_t, N>;
  const Bits u = convert<Bits>(load_raw<Vec<std::uint16_t, N>, bfloat16, N>(p)) << 16;
  Vec<float, N> f;
  std::memcpy(&f, &u, sizeof(f));
  return f;
}

template <int N>
BN_INLINE void store_bfloat16(bfloat16* p, Vec<float, N> v) {
  using Bits = Vec<std::uint32_t, N>;
  Bits u;
  std::memcpy(&u, &v, sizeof(u));
  const Bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Bits nan = (u >> 16) | 0x40u;
  const auto is_nan = (u & 0x7fffffffu) > 0x7f800000u;
  const Vec<std::uint16_t, N> half = convert<Vec<std::uint16_t, N>>(is_nan ? nan : rounded);
  std::memcpy(p, &half, sizeof(half));
}

template <int N>
struct Lanes<float, N, bfloat16> {
  static BN_INLINE Vec<float, N> load(const bfloat16* p) { return load_bfloat16<N>(p); }
  static BN_INLINE void store(bfloat16* p, Vec<float, N> v) { store_bfloat16<N>(p, v); }
};

template <int N>
struct Lanes<double, N, bfloat16> {
  static BN_INLINE Vec<double, N> load(const bfloat16* p) {
    return convert<Vec<double, N>>(load_bfloat16<N>(p));
  }
  static BN_INLINE void store(bfloat16* p, Vec<double, N> v) {
    store_bfloat16<N>(p, convert<Vec<float, N>>(v));
  }
};
#endif

#if defined(__F16C__) && defined(__GNUC__)
template <int N>
struct Float16Lanes;
template <>
struct Float16Lanes<4> {
  static BN_INLINE Vec<float, 4> load(const float16* p) {
    return (Vec<float, 4>)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static BN_INLINE void store(float16* p, Vec<float, 4> v) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph((__m128)v, 0));
  }
};
template <>
struct Float16Lanes<8> {
  static BN_INLINE Vec<float, 8> load(const float16* p) {
    return (Vec<float, 8>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static BN_INLINE void store(float16* p, Vec<float, 8> v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
  }
};
#if defined(BN_AVX512)
template <>
struct Float16Lanes<16> {
  static BN_INLINE Vec<float, 16> load(const float16* p) {
    return (Vec<float, 16>)_mm512_cvtph_ps(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static BN_INLINE void store(float16* p, Vec<float, 16> v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
  }
};
#endif
template <int N>
struct Lanes<float, N, float16> : Float16Lanes<N> {};
template <int N>
struct Lanes<double, N, float16> {
  static BN_INLINE Vec<double, N> load(const float16* p) {
    return convert<Vec<double, N>>(Float16Lanes<N>::load(p));
  }
  static BN_INLINE void store(float16* p, Vec<double, N> v) {
    Float16Lanes<N>::store(p, convert<Vec<float, N>>(v));
  }
};
#endif

template <class P, int N, class T>
BN_INLINE Vec<P, N> load(const T* p) {
  return Lanes<P, N, T>::load(p);
}

template <int N, class T, class V>
BN_INLINE void store(T* p, V v) {
  Lanes<typename std::remove_reference<decltype(v[0])>::type, N, T>::store(p, v);
}

#if defined(__GNUC__) || defined(__clang__)
// All ones in the first n lanes of the integer vector `I`, zero in the others.
template <class I, int N>
BN_INLINE I lane_mask(index n) {
  I count;
  for (int i = 0; i < N; ++i) count[i] = i;
  return count < (static_cast<typename std::remove_reference<decltype(count[0])>::type>(n) - I{});
}
#endif

// The first n < N elements; the other lanes are zero, or are not written.
template <class P, int N, class T>
BN_INLINE Vec<P, N> load_part(const T* p, index n) {
#if defined(__AVX2__)
  if constexpr (std::is_same<T, float>::value) {
    const auto as = [](Vec<float, N> v) {
      if constexpr (std::is_same<P, float>::value) {
        return v;
      } else {
        return convert<Vec<P, N>>(v);
      }
    };
#if defined(BN_AVX512)
    if constexpr (N == 16) return as((Vec<float, 16>)_mm512_maskz_loadu_ps(
        __mmask16((1u << n) - 1u), p));
#endif
    if constexpr (N == 8) return as((Vec<float, 8>)_mm256_maskload_ps(
        p, (__m256i)lane_mask<Vec<std::int32_t, 8>, 8>(n)));
    if constexpr (N == 4) return as((Vec<float, 4>)_mm_maskload_ps(
        p, (__m128i)lane_mask<Vec<std::int32_t, 4>, 4>(n)));
  }
#endif
  T lane[N] = {};
  for (index i = 0; i < n; ++i) lane[i] = p[i];
  return load<P, N>(lane);
}

template <int N, class T, class V>
BN_INLINE void store_part(T* p, V v, index n) {
#if defined(__AVX2__)
  if constexpr (std::is_same<T, float>::value && std::is_same<V, Vec<float, N>>::value) {
#if defined(BN_AVX512)
    if constexpr (N == 16) return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1u), (__m512)v);
#endif
    if constexpr (N == 8) return _mm256_maskstore_ps(
        p, (__m256i)lane_mask<Vec<std::int32_t, 8>, 8>(n), (__m256)v);
  }
#endif
  T lane[N];
  store<N>(lane, v);
  for (index i = 0; i < n; ++i) p[i] = lane[i];
}

// The first n lanes of a, the others of b.
template <class P, int N>
BN_INLINE Vec<P, N> join_lanes(Vec<P, N> a, Vec<P, N> b, index n) {
#if defined(__GNUC__) || defined(__clang__)
  using I = Vec<typename std::conditional<sizeof(P) == 8, std::int64_t, std::int32_t>::type, N>;
  return lane_mask<I, N>(n) ? a : b;
#else
  for (int i = 0; i < n; ++i) b[i] = a[i];
  return b;
#endif
}

// `v` where the weight is above zero, zero elsewhere: what a mask hides may be NaN.
template <class P, int N>
BN_INLINE Vec<P, N> where_weighted(Vec<P, N> weight, Vec<P, N> v) {
#if defined(__GNUC__) || defined(__clang__)
  return weight > Vec<P, N>{} ? v : Vec<P, N>{};
#else
  for (int i = 0; i < N; ++i) v[i] = weight[i] > 0 ? v[i] : P(0);
  return v;
#endif
}

// Lane by lane: z > 0 ? a : b.
template <class P, int N>
BN_INLINE Vec<P, N> where_positive(Vec<P, N> z, Vec<P, N> a, Vec<P, N> b) {
#if defined(__GNUC__) || defined(__clang__)
  return z > Vec<P, N>{} ? a : b;
#else
  for (int i = 0; i < N; ++i) b[i] = z[i] > 0 ? a[i] : b[i];
  return b;
#endif
}

// Lane by lane: NaN where z is NaN, zero elsewhere (infinities included).
template <class P, int N>
BN_INLINE Vec<P, N> nan_or_zero(Vec<P, N> z) {
#if defined(__GNUC__) || defined(__clang__)
  return z == z ? Vec<P, N>{} : z;
#else
  for (int i = 0; i < N; ++i) z[i] = z[i] == z[i] ? P(0) : z[i];
  return z;
#endif
}

// Lanes [k * D, k * D + D) of a vector of float32, as float64. Through registers: a vector whose
// address is taken is kept in memory, every addition to it included.
template <int N, class V>
BN_INLINE Vec<double, D> widen_lanes(V v, int k) {
#if defined(BN_AVX512)
  if constexpr (N == 16) {
    const __m256 half = k == 0 ? _mm512_castps512_ps256((__m512)v)
                               : _mm512_extractf32x8_ps((__m512)v, 1);
    return (Vec<double, 8>)_mm512_cvtps_pd(half);
  } else
#elif defined(__AVX2__)
  if constexpr (N == 8) {
    const __m128 half = k == 0 ? _mm256_castps256_ps128((__m256)v)
                               : _mm256_extractf128_ps((__m256)v, 1);
    return (Vec<double, 4>)_mm256_cvtps_pd(half);
  } else
#endif
  {
    float lane[N];
    std::memcpy(lane, &v, sizeof(lane));
    return load<double, D>(lane + k * D);
  }
}

// A vector of sums as D lanes of float64.
template <int N, class V>
BN_INLINE Vec<double, D> fold(V v) {
  if constexpr (std::is_same<V, Vec<double, D>>::value) {
    return v;
  } else {
    Vec<double, D> sum = widen_lanes<N>(v, 0);
    for (int k = 1; k < N / D; ++k) sum += widen_lanes<N>(v, k);
    return sum;
  }
}

// Lanes added in the order of a balanced tree.
BN_INLINE double sum_lanes(Vec<double, D> v) {
  double lane[D];
  std::memcpy(lane, &v, sizeof(lane));
  for (int half = D / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// Write N lanes past the cache; `p` is aligned to a line, or to a vector within one.
template <int N, class T, class V>
BN_INLINE void store_past_cache(T* p, V v) {
#if defined(__SSE2__)
  alignas(64) T value[N];
  store<N>(value, v);
  constexpr int bytes = N * int(sizeof(T));
#if defined(BN_AVX512)
  if constexpr (bytes % 64 == 0) {
    for (int k = 0; k < N; k += 64 / int(sizeof(T)))
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p + k), _mm512_load_si512(value + k));
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (bytes % 32 == 0) {
    for (int k = 0; k < N; k += 32 / int(sizeof(T)))
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p + k),
                          _mm256_load_si256(reinterpret_cast<const __m256i*>(value + k)));
    return;
  }
#endif
  if constexpr (bytes % 16 == 0) {
    for (int k = 0; k < N; k += 16 / int(sizeof(T)))
      _mm_stream_si128(reinterpret_cast<__m128i*>(p + k),
                       _mm_load_si128(reinterpret_cast<const __m128i*>(value + k)));
  } else {
    std::memcpy(p, value, sizeof(value));
  }
#else
  store<N>(p, v);
#endif
}

static inline std::size_t offset_in_line(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) & 63;
}

// Copy past the cache, in whole lines.
static inline void stream_out(char* to, const char* from, std::size_t bytes) {
  const std::size_t lead = (64 - offset_in_line(to)) & 63;
  if (bytes >= lead + 64) {
    if (lead) std::memcpy(to, from, lead);
    to += lead;
    from += lead;
    bytes -= lead;
    for (; bytes >= 64; bytes -= 64, to += 64, from += 64)
      for (std::size_t k = 0; k < 64; k += sizeof(float) * F)
        store_past_cache<F>(reinterpret_cast<float*>(to + k),
                            load<float, F>(reinterpret_cast<const float*>(from + k)));
  }
  if (bytes) std::memcpy(to, from, bytes);
}

// Make streamed lines visible to other threads.
static inline void stream_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
