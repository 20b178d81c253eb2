// The bodies for arrays of one type, which BN_DTYPE names: without weights, and with a last step in
// float64 for float64 and in float32 for the others. What few arrays need is instruction_set.cpp's.
#include "bodies.hpp"

namespace bn {
namespace BN_ISA {
namespace {

struct Elements {
  using f32 = float;
  using f64 = double;
  using f16 = float16;
  using bf16 = bfloat16;
};
using T = Elements::BN_DTYPE;
using P = std::conditional<std::is_same<T, double>::value, double, float>::type;

// BN_LEAN: machines hardly ever run this set, so one body asks at run time for what others are
// compiled for. The arithmetic is the same.
template <class Call>
void with_epilogue(const Job& job, Call call) {
#if defined(BN_LEAN)
  (void)job;
  call(std::integral_constant<int, general>{});
#else
  const Activation activation = job.epilogue.activation;
  if (activation >= Activation::relu6) return call(std::integral_constant<int, curved>{});
  if (job.residual.data) return call(std::integral_constant<int, full>{});
  if (activation == Activation::identity) return call(std::integral_constant<int, plain>{});
  call(std::integral_constant<int, activated>{});
#endif
}

void reduce_moments(const Job& job, const Block& b, double* out1, double* out2) {
  if (job.runs && !job.wide)
    reduce<T, P, plain, forward>(job, b, out1, out2);
  else
    reduce<T, double, plain, forward>(job, b, out1, out2);
}

void reduce_backward(const Job& job, const Block& b, double* out1, double* out2) {
  with_epilogue(job, [&](auto e) {
    reduce<T, P, decltype(e)::value, backward_batch>(job, b, out1, out2);
  });
}

void apply_forward(const Job& job, const Block& b) {
  with_epilogue(job, [&](auto e) { apply<T, P, decltype(e)::value, forward>(job, b); });
}

void apply_backward(const Job& job, const Block& b) {
  with_epilogue(job, [&](auto e) {
    constexpr int E = decltype(e)::value;
    if (E >= curved || job.batch_statistics)
      apply<T, P, E, backward_batch>(job, b);
    else if constexpr (E < curved)
      apply<T, P, E, backward_fixed>(job, b);
  });
}

}  // namespace

const Bodies BN_DTYPE = {reduce_moments, reduce_backward, apply_forward, apply_backward};

}  // namespace BN_ISA
}  // namespace bn
