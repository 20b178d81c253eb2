// The contract of the native core: four kernels and two fused entry points.
//
// An array is seen as (outer, channels, inner): every axis that is not the channel axis is either
// `outer` or `inner`, whichever way memory orders them (layout.hpp). Means, variances and
// coefficients are float64. Where the array's type is float32 or narrower, the last step, which turns an
// element of x into an element of y, runs in float32, and so do short runs of the sums of the fused
// entry points and of the backward pass; the sums of `moments` are float64 throughout.
//
//   moments        x                             -> count, dof; mean (as high + low part), m2 per channel
//   normalize      x, mean, var, gamma, beta     -> y      (+ residual, + activation)
//   backward_sums  grad_y, x, mean, var          -> sum(grad_z), sum(grad_z * x_hat) per channel
//   backward       grad_y, x, mean, var, sums    -> grad_x (+ grad_residual)
//   forward        = moments, then normalize     } per block of channels, while the block is still
//   backward_fused = backward_sums, then backward} in cache; the arithmetic is that of the pair
//
// where z = gamma * x_hat + beta + residual, y = activation(z), grad_z = grad_y * activation'(z).
// Backward, where a residual was added, y itself takes the place of z, for the residual may have been
// changed since: the gradient of relu6 is told by y, and that of leaky_relu by its sign (a slope must
// not be negative then). Those of hardswish and silu are not, so these two follow no residual.
//
// Results are bitwise the same for any number of threads: the work is cut by the array's size
// alone, each piece has a slot of its own for its partial sums, and slots are added in order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace bn {

using index = std::int64_t;

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

inline index size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

enum class Activation : int {
  identity = 0, relu = 1, leaky_relu = 2, relu6 = 3, hardswish = 4, silu = 5
};

// Raised for calls that the faces should have refused; becomes ValueError.
struct BadCall : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

constexpr int max_rank = 32;

// A strided array as the faces hand it over. `data == nullptr` means "not given".
struct Array {
  char* data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  index shape[max_rank] = {};
  index stride[max_rank] = {};  // in elements

  explicit operator bool() const { return data != nullptr; }

  // An array without values may have no address; it is present all the same. False: it has values and
  // no memory, as a tensor whose storage was resized to nothing, or a part of one: its address is an
  // offset from null, and no system has memory there.
  bool find_memory() {
    static char nowhere[64];
    constexpr std::uintptr_t lowest = 1 << 16;
    if (reinterpret_cast<std::uintptr_t>(data) >= lowest) return true;
    for (int d = 0; d < rank; ++d)
      if (shape[d] == 0) return data = nowhere, true;
    return false;
  }
};

// What z is made of besides x_hat, and what follows it.
struct Epilogue {
  Activation activation = Activation::identity;
  double slope = 0.01;  // of leaky_relu, for z < 0
};

// Per-channel values, each of length C. gamma and beta may be null (1 and 0); mean_low may be null.
struct Affine {
  const double* gamma = nullptr;
  const double* beta = nullptr;
};

struct Statistics {
  const double* mean = nullptr;
  const double* mean_low = nullptr;
  const double* var = nullptr;  // biased where it normalizes
  double eps = 0;
};

// Of some channels that follow one another.
struct Values {
  static constexpr index most = 256;
  double mean[most], mean_low[most], var[most], gamma[most], beta[most];
};
// Writes those of n channels from c on.
using ValuesOf = std::function<void(index c, index n, Values&)>;

// How many values a channel has: `count` is their number, or the sum of their weights; `dof`, the
// degrees of freedom of their variance, is count - 1, or with weights Σw - Σw²/Σw. Then m2 / dof is
// the mean of (x_i - x_j)²/2 over pairs of values, each pair weighted by w_i w_j: it does not depend
// on the scale of the weights, is finite wherever two of them are not zero, and with weights of 0
// and 1 it is m2 / (count - 1).
struct Count {
  double count = 0, dof = 0;
};

// weights: float64, the shape of x with channel stride 0; a zero weight hides whatever it covers,
// and y and grad_x are zero there.
Count moments(const Array& x, const Array& weights, int channel_axis, double* mean,
               double* mean_low, double* m2);

void normalize(const Array& x, const Array& residual, const Array& weights, const Array& y,
               int channel_axis, const Statistics&, const Affine&, const Epilogue&);
// The same with values that are asked for in pieces: a layer's are converted while they are at hand.
void normalize(const Array& x, const Array& residual, const Array& weights, const Array& y,
               int channel_axis, double eps, const ValuesOf&, const Epilogue&);

Count forward(const Array& x, const Array& residual, const Array& weights, const Array& y,
               int channel_axis, double eps, const Affine&, const Epilogue&, double* mean,
               double* mean_low, double* m2);

void backward_sums(const Array& grad_y, const Array& x, const Array& y,
                   const Array& weights, int channel_axis, const Statistics&, const Affine&,
                   const Epilogue&, double* sum_grad, double* sum_grad_x_hat);

// count == 0 means evaluation: the statistics are constants and the sums are not used.
void backward(const Array& grad_y, const Array& x, const Array& y, const Array& weights,
              const Array& grad_x, const Array& grad_residual, int channel_axis, double count,
              const Statistics&, const Affine&, const Epilogue&, const double* sum_grad,
              const double* sum_grad_x_hat);

void backward_fused(const Array& grad_y, const Array& x, const Array& y,
                    const Array& weights, const Array& grad_x, const Array& grad_residual,
                    int channel_axis, double count, const Statistics&, const Affine&,
                    const Epilogue&, double* sum_grad, double* sum_grad_x_hat);

// A parallel memcpy: the yardstick of the benchmarks.
void copy(void* to, const void* from, std::size_t bytes);

// Instruction sets, lowest first.
std::vector<std::string> instruction_sets();  // those that this machine runs
std::string instruction_set();                // the one in use
void use_instruction_set(const std::string& name);

bool has_openmp();
int threads();

// ---- what an instruction set provides (bodies.hpp), and the driver (driver.cpp) calls ------------

// One array of a call after layout.hpp: strides in elements.
struct Operand {
  char* data = nullptr;
  index outer = 0, channel = 0, inner = 0;
};

// A rectangle of the (outer, channels, inner) view.
struct Block {
  index outer_begin, outer_end, inner_begin, inner_end, channel_begin, channel_end;
};

constexpr index widest = 2048;  // channels side by side in a block, at the most

struct Job {
  bool rows = true;    // rows: inner is contiguous; otherwise channels are
  bool dense = false;  // and they follow one another without a gap, with no weights to skip
  DType dtype = DType::f32;
  bool wide = false;  // the last step in float64 although x is narrower
  bool batch_statistics = true;  // backward only: false in evaluation
  bool runs = false;             // moments in float32 runs
  bool far = false;              // x and grad are likely to come from memory
  bool stream = false;           // write past the cache
  Epilogue epilogue;
  Operand x, grad, residual, weights, out, out_residual;
  // per channel, all float64 (rounded to float32 where the last step runs in it)
  const double* shift = nullptr;   // z = (x - shift) * scale + offset + residual
  const double* scale = nullptr;
  const double* offset = nullptr;
  const double* tilt = nullptr;    // grad_x = scale * (grad_z - level - (x - shift) * tilt)
  const double* level = nullptr;
};  // sums are those of x - shift and its square, or of grad_z and grad_z * (x - shift)

using PerChannel = const double* Job::*;

struct InstructionSet {
  const char* name;
  // First and second sum of each channel of the block, written (not added) to out1, out2.
  void (*reduce_moments)(const Job&, const Block&, double* out1, double* out2);
  void (*reduce_backward)(const Job&, const Block&, double* out1, double* out2);
  void (*apply_forward)(const Job&, const Block&);
  void (*apply_backward)(const Job&, const Block&);
  void (*copy)(char* to, const char* from, std::size_t bytes, bool stream);
};

const InstructionSet& current_instruction_set();

}  // namespace bn
