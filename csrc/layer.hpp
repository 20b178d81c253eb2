// What a framework's layer needs above the kernels: parameters of any type, statistics in one block,
// groups of examples, running averages.
#pragma once

#include "kernels.hpp"

namespace bn {

// The moments of each group of examples, as a layer keeps them from its forward to its backward pass:
// float64 of shape (groups, statistics_rows, C). Given statistics, as in evaluation, are a count of
// one and m2 = variance; whether statistics are measured on x or given is told beside them.
enum : int { count_row, mean_row, mean_low_row, m2_row, dof_row, statistics_rows };

// Group k is examples [k * size, (k + 1) * size) along axis 0, and the last takes what is left.
struct Groups {
  index number = 1, size = 0;
};

struct Parameters {
  Array gamma, beta;  // (C,) of any type, or not given
};

void layer_forward(const Array& x, const Array& residual, const Array& weights, const Array& y,
                   int channel_axis, double eps, const Parameters&, const Epilogue&, Groups,
                   double* statistics);

void layer_normalize(const Array& x, const Array& residual, const Array& weights, const Array& y,
                     int channel_axis, double eps, const Parameters&, const Epilogue&, Groups,
                     const double* statistics);

// `measured`: the statistics are those of x, and so take part in its gradient. grad_x and
// grad_residual may be left out; grad_gamma and grad_beta are (C,) of any type, or left out.
void layer_backward(const Array& grad_y, const Array& x, const Array& y,
                    const Array& weights, const Array& grad_x, const Array& grad_residual,
                    int channel_axis, double eps, const Parameters&, const Epilogue&, Groups,
                    const double* statistics, bool measured, const Array& grad_gamma,
                    const Array& grad_beta);

// Statistics that do not depend on x. Returns the first channel of negative variance, or -1.
index given_statistics(const Array& mean, const Array& var, double* statistics);

// Running averages after one more batch, of which `statistics` are one group's: `momentum` is the
// weight of the batch, NaN for 1 / (batches so far); the variance kept is m2 / dof. A batch of which
// a mean or variance is not finite in the type of the averages changes nothing, unless
// `even_if_not_finite`. One without degrees of freedom leaves the averages as they are. `tracked`,
// which may be null, counts the batches; one without values only if `count_empty`. Returns the
// first channel that is not finite, or -1.
index update_running(const double* statistics, const Array& mean, const Array& var,
                     std::int64_t* tracked, double momentum, bool even_if_not_finite,
                     bool count_empty);

}  // namespace bn
