// Activations and their gradients, on vectors. Included by bodies.hpp only, inside the namespace of an
// instruction set; nothing here may have external linkage.

// What follows (x - shift) * scale + offset:
enum : int {
  plain = 0,      // nothing
  activated = 1,  // relu or leaky_relu
  full = 2,       // a residual, then one of them or nothing
  curved = 3,     // relu6, hardswish or silu
  general = 4,    // any of these, and weights: asked at run time
};

// What the loops over elements ask of a job.
template <class P>
struct Settings {
  Activation activation;
  P slope;  // of z below zero, with those activations that have one
  bool slope_is_zero;
  bool batch_statistics;
  explicit Settings(const Job& j)
      : activation(j.epilogue.activation),
        slope(P(activation == Activation::identity ? 1
                : activation == Activation::relu   ? 0
                                                   : j.epilogue.slope)),
        slope_is_zero(slope == P(0)),
        batch_statistics(j.batch_statistics) {}
};

// ---- identity, relu, leaky_relu -----------------------------------------------------------------

// z where z > 0 and slope * z elsewhere; a slope of zero is written as zero, for 0 * inf would be
// NaN and -1 * 0 would be -0.
template <class P, int N>
BN_INLINE Vec<P, N> bend(Vec<P, N> z, const Settings<P>& s) {
  const Vec<P, N> below = s.slope_is_zero ? nan_or_zero<P, N>(z) : z * splat<P, N>(s.slope);
  return where_positive<P, N>(z, z, below);
}

template <class P, int N>
BN_INLINE Vec<P, N> bend_gradient(Vec<P, N> z, Vec<P, N> g, const Settings<P>& s) {
  const Vec<P, N> below = s.slope_is_zero ? splat<P, N>(0) : g * splat<P, N>(s.slope);
  return where_positive<P, N>(z, g, below);
}

// ---- silu ---------------------------------------------------------------------------------------

// e to the x, right to 2 units in the last place, subnormal results, infinities and NaN included:
// x = n ln 2 + r with |r| <= ln 2 / 2, and the Taylor series of e^r, whose first term left out is
// below a twentieth of a unit.
template <class P, int N>
BN_INLINE Vec<P, N> exponential(Vec<P, N> x) {
#if defined(__GNUC__) || defined(__clang__)
  constexpr bool narrow = sizeof(P) == 4;
  using I = Vec<typename std::conditional<narrow, std::int32_t, std::int64_t>::type, N>;
  constexpr int terms = narrow ? 7 : 13, mantissa = narrow ? 23 : 52, bias = narrow ? 127 : 1023;
  // The high part has so few digits that its product with n is exact.
  constexpr double ln2_high = narrow ? 0.693359375 : 6.93147180369123816490e-01;
  constexpr double ln2_low = narrow ? -2.12194440054690583e-4 : 1.90821492927058770002e-10;
  // From here on results are zero, or infinite; NaN passes both comparisons.
  const Vec<P, N> lowest = splat<P, N>(narrow ? -104 : -746), highest = splat<P, N>(narrow ? 89 : 710);
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  // Where a unit in the last place is 1, addition rounds to an integer and leaves it in the low bits.
  const Vec<P, N> ones = splat<P, N>(narrow ? 12582912. : 6755399441055744.);
  const Vec<P, N> shifted = x * splat<P, N>(1.44269504088896340736) + ones;
  const Vec<P, N> n = shifted - ones;
  const Vec<P, N> r = (x - n * splat<P, N>(ln2_high)) - n * splat<P, N>(ln2_low);
  Vec<P, N> sum = splat<P, N>(1);
  double factorial[terms + 1] = {1};
  for (int k = 1; k <= terms; ++k) factorial[k] = factorial[k - 1] * k;
  sum = splat<P, N>(1 / factorial[terms]);
  BN_UNROLL
  for (int k = terms - 1; k >= 0; --k) sum = sum * r + splat<P, N>(1 / factorial[k]);
  // 2^n in two factors, for it may lie outside the range of P where the result does not.
  I power, zero;
  std::memcpy(&power, &shifted, sizeof(power));
  std::memcpy(&zero, &ones, sizeof(zero));
  power -= zero;
  const I half = power >> 1;
  const I bits[2] = {(half + bias) << mantissa, (power - half + bias) << mantissa};
  Vec<P, N> factor[2];
  std::memcpy(factor, bits, sizeof(bits));
  return sum * factor[0] * factor[1];
#else
  for (int i = 0; i < N; ++i) x[i] = std::exp(x[i]);
  return x;
#endif
}

// Apart from the loops: the code is long, and a call costs little beside it.
template <class P, int N>
BN_APART Vec<P, N> silu(Vec<P, N> z) {
  return z / (splat<P, N>(1) + exponential<P, N>(splat<P, N>(0) - z));
}

template <class P, int N>
BN_APART Vec<P, N> silu_derivative(Vec<P, N> z) {
  const Vec<P, N> one = splat<P, N>(1);
  const Vec<P, N> e = exponential<P, N>(splat<P, N>(0) - z);
  const Vec<P, N> s = one / (one + e);  // the sigmoid of z
  // 1 - s, each way where it loses no digits and e is finite.
  const Vec<P, N> rest = where_positive<P, N>(z, e * s, one - s);
  return s * (one + z * rest);
}

// ---- relu6, hardswish ---------------------------------------------------------------------------

template <class P, int N>
BN_INLINE Vec<P, N> from_0_to_6(Vec<P, N> z) {
  const Vec<P, N> six = splat<P, N>(6);
  z = where_positive<P, N>(z, z, nan_or_zero<P, N>(z));
  return where_positive<P, N>(z - six, six, z);
}

template <class P, int N>
BN_INLINE Vec<P, N> curve(Vec<P, N> z, Activation activation) {
  if (activation == Activation::silu) return silu<P, N>(z);
  if (activation == Activation::relu6) return from_0_to_6<P, N>(z);
  return z * (from_0_to_6<P, N>(z + splat<P, N>(3)) * splat<P, N>(1.0 / 6));
}

// The gradients of PyTorch: at the edges that of relu6 is 0, that of hardswish 0 and 1.
template <class P, int N>
BN_INLINE Vec<P, N> curve_gradient(Vec<P, N> z, Vec<P, N> g, Activation activation) {
  if (activation == Activation::silu) return g * silu_derivative<P, N>(z);
  const bool relu6 = activation == Activation::relu6;
  const Vec<P, N> low = splat<P, N>(relu6 ? 0 : 3), high = splat<P, N>(relu6 ? 6 : 3);
  const Vec<P, N> zero = splat<P, N>(0);
  const Vec<P, N> between =
      relu6 ? g : g * (z * splat<P, N>(1.0 / 3) + splat<P, N>(0.5));
  const Vec<P, N> above = relu6 ? zero : g;
  return where_positive<P, N>(z + low, where_positive<P, N>(high - z, between, above), zero);
}

// ---- by kind ------------------------------------------------------------------------------------

template <class P, int N>
BN_APART Vec<P, N> any_activation(Vec<P, N> z, const Settings<P>& s) {
  return s.activation >= Activation::relu6 ? curve<P, N>(z, s.activation) : bend<P, N>(z, s);
}

template <class P, int N>
BN_APART Vec<P, N> any_gradient(Vec<P, N> z, Vec<P, N> g, const Settings<P>& s) {
  return s.activation >= Activation::relu6 ? curve_gradient<P, N>(z, g, s.activation)
                                           : bend_gradient<P, N>(z, g, s);
}

template <int E, class P, int N>
BN_INLINE Vec<P, N> activate(Vec<P, N> z, const Settings<P>& s) {
  if constexpr (E == general) {
    return s.activation == Activation::identity ? z : any_activation<P, N>(z, s);
  } else if constexpr (E == curved) {
    return curve<P, N>(z, s.activation);
  } else {
    return bend<P, N>(z, s);
  }
}

template <int E, class P, int N>
BN_INLINE Vec<P, N> gradient(Vec<P, N> z, Vec<P, N> g, const Settings<P>& s) {
  if constexpr (E == general) {
    return s.activation == Activation::identity ? g : any_gradient<P, N>(z, g, s);
  } else if constexpr (E == curved) {
    return curve_gradient<P, N>(z, g, s.activation);
  } else {
    return bend_gradient<P, N>(z, g, s);
  }
}
