// What a framework's layer needs besides the kernels: parameters of any type, statistics in one
// block, groups of examples, running averages.
#pragma once

#include "kernels.hpp"

namespace bn {

// The moments of each group of examples, as a layer keeps them from its forward to its backward pass:
// float64 of shape (groups, statistics_rows, C). Statistics that are given, as in evaluation, have
// count 1 and m2 = variance; an argument `measured` says whether they are those of x.
enum : int { count_row, mean_row, mean_low_row, m2_row, dof_row, statistics_rows };

// Group k is examples [k * size, (k + 1) * size) along axis 0; the last one ends with the batch.
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

// `layer_normalize` by a given mean and variance, (C,) of any type, without keeping statistics.
void layer_inference(const Array& x, const Array& y, int channel_axis, double eps,
                     const Array& mean, const Array& var, const Parameters&, const Epilogue&);

// `measured`: the statistics are those of x, so its gradient includes them. grad_x and grad_residual
// may be absent; grad_gamma and grad_beta are (C,) of any type, or absent.
void layer_backward(const Array& grad_y, const Array& x, const Array& y,
                    const Array& weights, const Array& grad_x, const Array& grad_residual,
                    int channel_axis, double eps, const Parameters&, const Epilogue&, Groups,
                    const double* statistics, bool measured, const Array& grad_gamma,
                    const Array& grad_beta);

// Whether a variance is negative, NaN or infinite, or var + eps zero, or a mean NaN or infinite.
bool has_bad_statistics(const Array& mean, const Array& var, double eps);
index negative_variance(const Array& var);  // the first channel that has one, or -1

// Statistics that do not depend on x. Returns the first channel with a negative variance, or -1.
index given_statistics(const Array& mean, const Array& var, double* statistics);

// Mean and m2 of two parts together (Chan, Golub & LeVeque 1979). `step` is 0 where a part has one count
// for all channels, and 1 where it has one for each.
struct Part {
  const double *count, *mean, *m2;
  index step;
};
void merge(const Part& a, const Part& b, index channels, double* mean, double* m2);

// Update the running averages with a batch, whose `statistics` are one group. `momentum` is the
// weight of the batch, NaN for 1 / (number of batches so far). The variance is m2 / dof. If a mean or
// variance is not finite in the type of the averages, nothing changes, unless `even_if_not_finite`.
// Without degrees of freedom, the averages do not change. `tracked`, which may be null, counts the
// batches, those without values only if `count_empty`. Returns the first channel that is not
// finite, or -1.
index update_running(const double* statistics, const Array& mean, const Array& var,
                     std::int64_t* tracked, double momentum, bool even_if_not_finite,
                     bool count_empty);

}  // namespace bn
