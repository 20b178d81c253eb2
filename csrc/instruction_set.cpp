// What an instruction set provides, by the type of the array; and one general body of each kind for
// what few arrays need: weights, a last step in float64 where the type is narrower, and relu6 after a
// residual. It asks a job for everything at run time.
#include "bodies.hpp"

namespace bn {
namespace BN_ISA {
namespace {

const Bodies& by_type(const Job& job) {
  switch (job.dtype) {
    case DType::f32: return f32;
    case DType::f64: return f64;
    case DType::f16: return f16;
    case DType::bf16: return bf16;
  }
  return f32;
}

// Always in float64: such arrays are rare, and one body less is compiled for each type.
template <class T>
constexpr Bodies in_float64 = {
    reduce<T, double, general, forward>, reduce<T, double, general, backward_batch>,
    apply<T, double, general, forward>, apply<T, double, general, backward_batch>};

const Bodies& general_by_type(const Job& job) {
  switch (job.dtype) {
    case DType::f32: return in_float64<float>;
    case DType::f64: return in_float64<double>;
    case DType::f16: return in_float64<float16>;
    case DType::bf16: return in_float64<bfloat16>;
  }
  return in_float64<float>;
}

const Bodies& bodies(const Job& job) {
  const bool curve_of_sum = job.epilogue.activation >= Activation::relu6 && job.residual.data;
  return job.wide || job.weights.data || curve_of_sum ? general_by_type(job) : by_type(job);
}

void reduce_moments(const Job& job, const Block& b, double* out1, double* out2) {
  const Bodies& found = job.weights.data ? general_by_type(job) : by_type(job);
  found.reduce_moments(job, b, out1, out2);
}

void reduce_backward(const Job& job, const Block& b, double* out1, double* out2) {
  bodies(job).reduce_backward(job, b, out1, out2);
}

void apply_forward(const Job& job, const Block& b) { bodies(job).apply_forward(job, b); }

void apply_backward(const Job& job, const Block& b) { bodies(job).apply_backward(job, b); }

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
