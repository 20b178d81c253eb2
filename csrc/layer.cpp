// Composition of kernels.hpp: no arithmetic on elements here.
#include "layer.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "half.hpp"

namespace bn {
namespace {

// visit(p, step) with the elements of a vector by their type. A step of 1 is passed as a constant:
// such loops are vectorized.
template <class Visit>
void elements(const Array& a, Visit visit) {
  auto as = [&](auto* p) {
    if (a.stride[0] == 1)
      visit(p, std::integral_constant<index, 1>{});
    else
      visit(p, a.stride[0]);
  };
  switch (a.dtype) {
    case DType::f32: return as(reinterpret_cast<float*>(a.data));
    case DType::f64: return as(reinterpret_cast<double*>(a.data));
    case DType::f16: return as(reinterpret_cast<float16*>(a.data));
    case DType::bf16: return as(reinterpret_cast<bfloat16*>(a.data));
  }
}

void read(const Array& a, index first, index n, double* to) {
  elements(a, [&](auto* p, auto step) {
    for (index c = 0; c < n; ++c) to[c] = widen(p[(first + c) * step]);
  });
}

void read(const Array& a, double* to) { read(a, 0, a.shape[0], to); }

void write(const Array& a, const double* from) {
  if (!a) return;
  elements(a, [&](auto* p, auto step) {
    for (index c = 0; c < a.shape[0]; ++c) narrow(from[c], &p[c * step]);
  });
}

// A parameter as float64, which the kernels read.
class Wide {
 public:
  explicit Wide(const Array& a) {
    if (!a) return;
    if (a.dtype == DType::f64 && (a.stride[0] == 1 || a.shape[0] == 1)) {
      data_ = reinterpret_cast<const double*>(a.data);
      return;
    }
    copy_.reset(new double[std::size_t(a.shape[0]) + 1]);  // not null for C = 0
    read(a, copy_.get());
    data_ = copy_.get();
  }
  const double* data() const { return data_; }

 private:
  const double* data_ = nullptr;
  std::unique_ptr<double[]> copy_;
};

Array examples(const Array& a, Groups g, index k) {
  if (!a || g.number == 1) return a;
  Array part = a;
  part.data += k * g.size * a.stride[0] * size_of(a.dtype);
  part.shape[0] = k + 1 == g.number ? a.shape[0] - k * g.size : g.size;
  return part;
}

double* row(double* statistics, index channels, index group, int r) {
  return statistics + (group * statistics_rows + r) * channels;
}
const double* row(const double* statistics, index channels, index group, int r) {
  return statistics + (group * statistics_rows + r) * channels;
}

// Moves `a` towards new values, by their share `weight`, where there are degrees of freedom.
void blend(const Array& a, const double* values, const double* dofs, double weight) {
  elements(a, [&](auto* p, auto step) {
    for (index c = 0; c < a.shape[0]; ++c) {
      const double old = widen(p[c * step]), moved = old * (1 - weight) + weight * values[c];
      narrow(dofs[c] > 0 ? moved : old, &p[c * step]);
    }
  });
}

// Numbers of this magnitude and above round to infinity.
double limit_of(DType t) {
  switch (t) {
    case DType::f32: return 0x1.ffffffp127;
    case DType::f64: return HUGE_VAL;
    case DType::f16: return 65520;
    case DType::bf16: return 0x1.ffp127;
  }
  return HUGE_VAL;
}

// The statistics of one group as the kernels take them. The variance that normalizes is the biased
// one; without values any will do: there is nothing to normalize, and every gradient is zero.
class OfGroup {
 public:
  OfGroup(const double* s, index channels, index k)
      : mean_(row(s, channels, k, mean_row)),
        mean_low_(row(s, channels, k, mean_low_row)),
        var_(row(s, channels, k, m2_row)) {
    const double count = channels ? row(s, channels, k, count_row)[0] : 1;  // of every channel
    if (count == 1) return;  // as that of given statistics
    const double* m2 = var_;
    storage_.reset(new double[std::size_t(channels)]);
    for (index c = 0; c < channels; ++c) storage_[std::size_t(c)] = count > 0 ? m2[c] / count : 1;
    var_ = storage_.get();
  }
  Statistics with(double eps) const { return {mean_, mean_low_, var_, eps}; }

 private:
  const double *mean_, *mean_low_, *var_;
  std::unique_ptr<double[]> storage_;
};

}  // namespace

void layer_forward(const Array& x, const Array& residual, const Array& weights, const Array& y,
                   int axis, double eps, const Parameters& p, const Epilogue& epilogue, Groups g,
                   double* statistics) {
  const index channels = x.shape[axis];
  const Wide gamma(p.gamma), beta(p.beta);
  for (index k = 0; k < g.number; ++k) {
    const Count count = forward(examples(x, g, k), examples(residual, g, k),
                                examples(weights, g, k), examples(y, g, k), axis, eps,
                                {gamma.data(), beta.data()}, epilogue,
                                row(statistics, channels, k, mean_row),
                                row(statistics, channels, k, mean_low_row),
                                row(statistics, channels, k, m2_row));
    std::fill_n(row(statistics, channels, k, count_row), channels, count.count);
    std::fill_n(row(statistics, channels, k, dof_row), channels, count.dof);
  }
}

void layer_normalize(const Array& x, const Array& residual, const Array& weights, const Array& y,
                     int axis, double eps, const Parameters& p, const Epilogue& epilogue,
                     Groups g, const double* statistics) {
  const Wide gamma(p.gamma), beta(p.beta);
  for (index k = 0; k < g.number; ++k) {
    const OfGroup s(statistics, x.shape[axis], k);
    normalize(examples(x, g, k), examples(residual, g, k), examples(weights, g, k),
              examples(y, g, k), axis, s.with(eps), {gamma.data(), beta.data()}, epilogue);
  }
}

void layer_inference(const Array& x, const Array& y, int axis, double eps, const Array& mean,
                     const Array& var, const Parameters& p, const Epilogue& epilogue) {
  normalize(x, {}, {}, y, axis, eps, [&](index c, index n, Values& v) {
    read(mean, c, n, v.mean);
    std::fill_n(v.mean_low, n, 0.0);
    read(var, c, n, v.var);
    if (p.gamma)
      read(p.gamma, c, n, v.gamma);
    else
      std::fill_n(v.gamma, n, 1.0);
    if (p.beta)
      read(p.beta, c, n, v.beta);
    else
      std::fill_n(v.beta, n, 0.0);
  }, epilogue);
}

bool has_bad_statistics(const Array& mean, const Array& var, double eps) {
  index good = 1;
  elements(mean, [&](auto* p, auto step) {
    for (index c = 0; c < mean.shape[0]; ++c) good &= index(std::fabs(widen(p[c * step])) <= DBL_MAX);
  });
  elements(var, [&](auto* p, auto step) {
    for (index c = 0; c < var.shape[0]; ++c) {
      const double v = widen(p[c * step]);
      good &= index(v >= 0) & index(v <= DBL_MAX) & index(v + eps > 0);
    }
  });
  return !good;
}

index negative_variance(const Array& var) {
  index negative = -1;
  elements(var, [&](auto* p, auto step) {
    index any = 0;
    for (index c = 0; c < var.shape[0]; ++c) any |= index(widen(p[c * step]) < 0);
    for (index c = var.shape[0]; any && c-- > 0;)
      if (widen(p[c * step]) < 0) negative = c;
  });
  return negative;
}

void layer_backward(const Array& grad_y, const Array& x, const Array& y,
                    const Array& weights, const Array& grad_x, const Array& grad_residual,
                    int axis, double eps, const Parameters& p, const Epilogue& epilogue, Groups g,
                    const double* statistics, bool measured, const Array& grad_gamma,
                    const Array& grad_beta) {
  const index channels = x.shape[axis];
  const Wide gamma(p.gamma), beta(p.beta);
  const Affine affine{gamma.data(), beta.data()};
  const std::unique_ptr<double[]> sums(new double[std::size_t(4 * channels) + 1]);
  double *sum_grad = sums.get(), *sum_grad_x_hat = sum_grad + channels;
  double *part = g.number == 1 ? sum_grad : sum_grad_x_hat + channels;
  if (part != sum_grad) std::fill_n(sum_grad, 2 * channels, 0.0);
  for (index k = 0; k < g.number; ++k) {
    const OfGroup s(statistics, channels, k);
    const double count = measured && channels ? row(statistics, channels, k, count_row)[0] : 0;
    if (grad_x)
      backward_fused(examples(grad_y, g, k), examples(x, g, k), examples(y, g, k),
                     examples(weights, g, k), examples(grad_x, g, k),
                     examples(grad_residual, g, k), axis, count, s.with(eps), affine, epilogue,
                     part, part + channels);
    else
      backward_sums(examples(grad_y, g, k), examples(x, g, k), examples(y, g, k),
                    examples(weights, g, k), axis, s.with(eps), affine, epilogue, part,
                    part + channels);
    if (part != sum_grad)
      for (index c = 0; c < 2 * channels; ++c) sum_grad[c] += part[c];
  }
  write(grad_gamma, sum_grad_x_hat);
  write(grad_beta, sum_grad);
}

index given_statistics(const Array& mean, const Array& var, double* statistics) {
  const index channels = mean.shape[0];
  const auto part = [&](int r) { return row(statistics, channels, 0, r); };
  std::fill_n(part(count_row), channels, 1.0);
  read(mean, part(mean_row));
  std::fill_n(part(mean_low_row), channels, 0.0);
  read(var, part(m2_row));
  std::fill_n(part(dof_row), channels, 0.0);
  return negative_variance(var);
}

void merge(const Part& a, const Part& b, index channels, double* mean, double* m2) {
  const auto merge_one = [&](index c, double na, double nb) {
    const double n = na + nb, share = n > 0 ? nb / n : 0;
    const double delta = b.mean[c] - a.mean[c];
    // The mean of an empty part may be anything.
    const bool both = (na != 0) & (nb != 0);
    const double moved = a.mean[c] + delta * share;
    mean[c] = both ? moved : nb == 0 ? a.mean[c] : b.mean[c];
    m2[c] = a.m2[c] + b.m2[c] + (both ? delta * delta * na * share : 0.0);
    if (both && !(delta - delta == 0))  // further apart than float64 reaches
      mean[c] = (1 - share) * a.mean[c] + share * b.mean[c];
  };
  for (index c = 0; c < channels; ++c) merge_one(c, a.count[c * a.step], b.count[c * b.step]);
}

index update_running(const double* statistics, const Array& mean, const Array& var,
                     std::int64_t* tracked, double momentum, bool even_if_not_finite,
                     bool count_empty) {
  const index channels = mean.shape[0];
  const double *counts = row(statistics, channels, 0, count_row),
               *means = row(statistics, channels, 0, mean_row),
               *m2s = row(statistics, channels, 0, m2_row),
               *dofs = row(statistics, channels, 0, dof_row);
  // m2 and dof have the scale of the weights, which may be as small as float64 can represent.
  std::vector<double> unbiased(static_cast<std::size_t>(channels));
  const double mean_limit = limit_of(mean.dtype), var_limit = limit_of(var.dtype);
  index finite = 1;
  for (index c = 0; c < channels; ++c) {  // no branches: vectorized
    const double v = m2s[c] / (dofs[c] > 0 ? dofs[c] : 1);
    unbiased[std::size_t(c)] = v;
    finite &= index(std::fabs(means[c]) < mean_limit) & index(std::fabs(v) < var_limit);
  }
  index not_finite = -1;
  for (index c = channels; !finite && c-- > 0;)
    if (!(std::fabs(means[c]) < mean_limit && std::fabs(unbiased[std::size_t(c)]) < var_limit))
      not_finite = c;
  if (not_finite >= 0 && !even_if_not_finite) return not_finite;
  if (!count_empty && channels > 0 && counts[0] == 0) return -1;
  if (tracked) ++*tracked;
  const double weight = std::isnan(momentum) ? 1 / double(tracked ? *tracked : 1) : momentum;
  blend(mean, means, dofs, weight);
  blend(var, unbiased.data(), dofs, weight);
  return not_finite;
}

}  // namespace bn
