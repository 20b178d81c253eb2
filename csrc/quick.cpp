// Whole calls in one crossing from Python.
//
// Each of these does all of a call on ordinary arguments: arrays or tensors of a supported type,
// numbers that need no conversion, nothing to refuse. Otherwise it returns None before anything has
// changed, and Python finds out whether the call is another kind of right, or wrong and how.
#include "quick.hpp"

#include <cfloat>
#include <exception>
#include <optional>

#include "foreign_tensor.hpp"
#include "kernels.hpp"
#include "layer.hpp"
#include "machine.hpp"
#include "numpy_array.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using bn::Array;
using bn::DType;
using bn::index;

constexpr index kept_from = 1 << 16;  // bytes; below, allocators keep memory by themselves
constexpr index releases_from = 1 << 14;  // values; letting other threads run costs more than fewer

class ReleasedFrom {
 public:
  explicit ReleasedFrom(index values) {
    if (values >= releases_from) released_.emplace();
  }

 private:
  std::optional<nb::gil_scoped_release> released_;
};

index values_of(const Array& a) {
  index n = 1;
  for (int d = 0; d < a.rank; ++d) n *= a.shape[d];
  return n;
}

bool number(nb::handle object, double* value) {
  if (!PyFloat_CheckExact(object.ptr())) return false;
  *value = PyFloat_AsDouble(object.ptr());
  return *value >= 0 && *value <= DBL_MAX;
}

// An array with a channel axis, counted from the front, and with values.
bool values_and_axis(nb::handle x, nb::handle channel_axis, Array* a, int* axis) {
  if (!numpy::is_array(x) || !numpy::read(x, false, a) || a->rank < 2 ||
      a->dtype == DType::bf16 ||  // integers, here
      !PyLong_CheckExact(channel_axis.ptr()))
    return false;
  const long given = PyLong_AsLong(channel_axis.ptr());
  if (given == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  if (given < -a->rank || given >= a->rank) return false;
  *axis = int(given < 0 ? given + a->rank : given);
  return values_of(*a) > 0;
}

// One value per channel, or nothing where that is allowed.
bool vector(nb::handle object, index channels, bool optional, Array* a) {
  if (object.is_none()) return optional;
  return numpy::is_array(object) && numpy::read(object, false, a) && a->rank == 1 &&
         a->shape[0] == channels && a->dtype != DType::bf16;
}

nb::object like(nb::handle x, Array* a) {
  nb::object y = nb::handle(numpy::registered.empty_like)(x);
  if (!numpy::read(y, true, a)) throw nb::value_error("empty_like: not an array like x");
  return y;
}

nb::object empty(nb::handle shape, Array* a) {
  nb::object y = nb::handle(numpy::registered.empty)(shape);
  if (!numpy::read(y, true, a)) throw nb::value_error("empty: not an array");
  return y;
}

nb::object quick_forward(nb::handle x, nb::handle gamma, nb::handle beta, nb::handle eps_,
                         nb::handle channel_axis) {
  Array ax, ay, as, ag, ab;
  int axis;
  double eps;
  if (!values_and_axis(x, channel_axis, &ax, &axis) || !number(eps_, &eps)) return nb::none();
  const index channels = ax.shape[axis], values = values_of(ax);
  if (values == channels || !vector(gamma, channels, true, &ag) ||
      !vector(beta, channels, true, &ab))
    return nb::none();
  nb::object y = like(x, &ay);
  nb::object statistics = empty(nb::make_tuple(1, int(bn::statistics_rows), channels), &as);
  {
    const ReleasedFrom released(values);
    bn::layer_forward(ax, {}, {}, ay, axis, eps, {ag, ab}, {}, {},
                      reinterpret_cast<double*>(as.data));
  }
  return nb::make_tuple(y, statistics, axis);
}

// `keep`: return the statistics and the axis, too.
nb::object quick_inference(nb::handle x, nb::handle mean, nb::handle var, nb::handle gamma,
                           nb::handle beta, nb::handle eps_, nb::handle channel_axis, bool keep) {
  Array ax, ay, as, am, av, ag, ab;
  int axis;
  double eps;
  if (!values_and_axis(x, channel_axis, &ax, &axis) || !number(eps_, &eps)) return nb::none();
  const index channels = ax.shape[axis];
  if (!vector(mean, channels, false, &am) || !vector(var, channels, false, &av) ||
      !vector(gamma, channels, true, &ag) || !vector(beta, channels, true, &ab))
    return nb::none();
  if (bn::has_bad_statistics(am, av, eps)) return nb::none();
  nb::object y = like(x, &ay);
  if (!keep) {
    const ReleasedFrom released(values_of(ax));
    bn::layer_inference(ax, ay, axis, eps, am, av, {ag, ab}, {});
    return y;
  }
  nb::object statistics = empty(nb::make_tuple(1, int(bn::statistics_rows), channels), &as);
  double* s = reinterpret_cast<double*>(as.data);
  bn::given_statistics(am, av, s);
  {
    const ReleasedFrom released(values_of(ax));
    bn::layer_normalize(ax, {}, {}, ay, axis, eps, {ag, ab}, {}, {}, s);
  }
  return nb::make_tuple(y, statistics, axis);
}

// Whether an array is the statistics of one group.
bool one_group(const Array& a, index channels) {
  return a.rank == 3 && a.dtype == DType::f64 && a.shape[0] == 1 &&
         a.shape[1] == bn::statistics_rows && a.shape[2] == channels &&
         a.stride[1] == channels && (channels < 2 || a.stride[2] == 1);
}

// The gradients of x, gamma and beta; the last two in the types of gamma and beta, or None.
nb::object quick_backward(nb::handle grad_y, nb::handle x, nb::handle statistics, int axis,
                          double eps, nb::handle gamma, nb::handle gamma_dtype,
                          nb::handle beta_dtype, bool measured) {
  Array ag, ax, as, ao, aw, aw_out, ab_out;
  if (!numpy::is_array(x) || !numpy::is_array(grad_y) || !numpy::is_array(statistics) ||
      !numpy::read(x, false, &ax) || !numpy::read(grad_y, false, &ag) ||
      !numpy::read(statistics, false, &as) || ag.dtype != ax.dtype || ag.rank != ax.rank ||
      ax.dtype == DType::bf16 || axis < 0 || axis >= ax.rank || !one_group(as, ax.shape[axis]))
    return nb::none();
  for (int d = 0; d < ax.rank; ++d)
    if (ag.shape[d] != ax.shape[d]) return nb::none();
  const index channels = ax.shape[axis];
  if (!vector(gamma, channels, true, &aw)) return nb::none();
  nb::object out[2];
  Array* of_out[2] = {&aw_out, &ab_out};
  const nb::handle dtypes[2] = {gamma_dtype, beta_dtype};
  for (int k = 0; k < 2; ++k) {
    if (dtypes[k].is_none()) {
      out[k] = nb::none();
      continue;
    }
    int code = 0;
    while (code < 3 && numpy::registered.dtypes[code] != dtypes[k].ptr()) ++code;
    if (code == 3) return nb::none();
    out[k] = nb::handle(numpy::registered.empty)(channels, dtypes[k]);
    if (!numpy::read(out[k], true, of_out[k])) return nb::none();
  }
  nb::object grad_x = like(x, &ao);
  {
    const ReleasedFrom released(values_of(ax));
    bn::layer_backward(ag, ax, {}, {}, ao, {}, axis, eps, {aw, {}}, {}, {},
                       reinterpret_cast<const double*>(as.data), measured, aw_out, ab_out);
  }
  return nb::make_tuple(grad_x, out[0], out[1]);
}

// ---- a framework's layer, likewise ---------------------------------------------------------------

// None also where a call raises, for want of memory for example: the general way raises it again.
template <class Body>
nb::object or_none(const Body& body) {
  try {
    return body();
  } catch (nb::python_error& error) {
    if (!error.matches(PyExc_Exception)) throw;  // an interrupt
  } catch (const std::exception&) {
  }
  return nb::none();
}

bool tensor(nb::handle object, Array* a) {
  PyTypeObject* type = Py_TYPE(object.ptr());  // no subclass
  const auto& known = foreign::registered;
  return known.type && (type == known.type || type == known.parameter) && foreign::read(object, a) &&
         a->find_memory();
}

// A vector of one value per channel, or nothing. Not one that is the negative of what its memory
// holds, as parts of complex tensors may be, which have gaps. Of x Python asks that itself.
bool tensor_vector(nb::handle object, index channels, Array* a) {
  return object.is_none() ||
         (tensor(object, a) && a->rank == 1 && a->shape[0] == channels &&
          ((a->stride[0] == 1 && channels > 1) ||
           nb::handle(foreign::registered.is_neg)(object).ptr() == Py_False));
}

// The arguments of a layer that fit together, with more than one value per channel.
struct LayerArrays {
  Array x, mean, var, weight, bias;
  index channels = 0;

  bool read(nb::handle x_, nb::handle mean_, nb::handle var_, nb::handle weight_,
            nb::handle bias_) {
    if (!tensor(x_, &x) || x.rank < 2) return false;
    channels = x.shape[1];
    return values_of(x) != channels && mean_.is_none() == var_.is_none() &&
           tensor_vector(mean_, channels, &mean) && tensor_vector(var_, channels, &var) &&
           tensor_vector(weight_, channels, &weight) && tensor_vector(bias_, channels, &bias);
  }
};

// A tensor like x for a result. `gradient`: in the format of gradients, which may differ.
nb::object tensor_like(nb::handle x, const Array& a, bool gradient, Array* to) {
  index expected = 1;
  bool contiguous = true;
  for (int d = a.rank - 1; d >= 0; expected *= a.shape[d], --d)
    contiguous = contiguous && a.stride[d] == expected;
  const index bytes = values_of(a) * bn::size_of(a.dtype);
  if (bytes >= kept_from) bn::keep_freed_memory();
  nb::object made = contiguous && bytes < foreign::registered.small
                        ? nb::handle(foreign::registered.empty_like)(x)
                        : nb::handle(foreign::registered.of_any)(x, gradient);
  // A mode of torch may have made something else of it.
  bool alike = tensor(made, to) && to->dtype == a.dtype && to->rank == a.rank;
  for (int d = 0; alike && d < a.rank; ++d) alike = to->shape[d] == a.shape[d];
  if (!alike) throw nb::value_error("empty_like: not a tensor like x");
  return made;
}

// y, and the statistics by which it was normalized: those of x, or the given ones, which are checked
// in any case. `keep`: the given ones are needed later; otherwise None is returned in their place.
nb::object quick_tensor_forward(nb::handle x, nb::handle mean, nb::handle var, nb::handle weight,
                                nb::handle bias, bool training, bool keep, nb::handle eps_,
                                index group_size, int activation, nb::handle slope_) {
  return or_none([&]() -> nb::object {
    LayerArrays a;
    Array y, s;
    double eps, slope;
    if (!number(eps_, &eps) || !number(slope_, &slope) || !(eps > 0) || group_size ||
        !a.read(x, mean, var, weight, bias) ||
        (!training && (!a.mean || bn::negative_variance(a.var) >= 0)))
      return nb::none();
    const bn::Parameters parameters{a.weight, a.bias};
    const bn::Epilogue epilogue{bn::Activation(activation), slope};
    nb::object result = tensor_like(x, a.x, false, &y), statistics = nb::none();
    if (!training && !keep) {
      const ReleasedFrom released(values_of(a.x));
      bn::layer_inference(a.x, y, 1, eps, a.mean, a.var, parameters, epilogue);
    } else {
      statistics = empty(nb::make_tuple(1, int(bn::statistics_rows), a.channels), &s);
      double* to = reinterpret_cast<double*>(s.data);
      const ReleasedFrom released(values_of(a.x));
      if (training) {
        bn::layer_forward(a.x, {}, {}, y, 1, eps, parameters, epilogue, {}, to);
      } else {
        bn::given_statistics(a.mean, a.var, to);
        bn::layer_normalize(a.x, {}, {}, y, 1, eps, parameters, epilogue, {}, to);
      }
    }
    return nb::make_tuple(result, statistics);
  });
}

// The gradients that are needed of x, weight and bias, None for the others and for one more argument.
nb::object quick_tensor_backward(nb::handle grad_y, nb::handle x, nb::handle statistics,
                                 nb::handle weight, nb::handle bias, bool measured, bool need_x,
                                 bool need_weight, bool need_bias, double eps, index group_size,
                                 int activation, double slope) {
  return or_none([&]() -> nb::object {
    Array ag, ax, as, aw, ab, to_x, to_weight, to_bias;
    if (!tensor(x, &ax) || !tensor(grad_y, &ag) || ag.dtype != ax.dtype || ag.rank != ax.rank ||
        !numpy::is_array(statistics) || !numpy::read(statistics, false, &as) || ax.rank < 2 ||
        !one_group(as, ax.shape[1]) || group_size)
      return nb::none();
    for (int d = 0; d < ax.rank; ++d)
      if (ag.shape[d] != ax.shape[d]) return nb::none();
    const index channels = ax.shape[1];
    if (!tensor_vector(weight, channels, &aw) || !tensor_vector(bias, channels, &ab))
      return nb::none();
    nb::object of_x = nb::none(), of_weight = nb::none(), of_bias = nb::none();
    if (need_x) of_x = tensor_like(x, ax, true, &to_x);
    if (need_weight && aw) of_weight = tensor_like(weight, aw, true, &to_weight);
    if (need_bias && ab) of_bias = tensor_like(bias, ab, true, &to_bias);
    {
      const ReleasedFrom released(values_of(ax));
      bn::layer_backward(ag, ax, {}, {}, to_x, {}, 1, eps, {aw, ab},
                         {bn::Activation(activation), slope}, {},
                         reinterpret_cast<const double*>(as.data), measured, to_weight, to_bias);
    }
    return nb::make_tuple(of_x, of_weight, of_bias, nb::none());
  });
}

}  // namespace

void define_quick(nb::module_& m) {
  // Whatever a caller may have passed comes here, None included.
  m.def("quick_forward", &quick_forward, "x"_a.none(), "gamma"_a.none(), "beta"_a.none(),
        "eps"_a.none(), "channel_axis"_a.none(),
        "(y, statistics, axis), or None where Python has to look.");
  m.def("quick_inference", &quick_inference, "x"_a.none(), "mean"_a.none(), "var"_a.none(),
        "gamma"_a.none(), "beta"_a.none(), "eps"_a.none(), "channel_axis"_a.none(), "keep"_a);
  m.def("quick_backward", &quick_backward, "grad_y"_a.none(), "x"_a, "statistics"_a, "axis"_a,
        "eps"_a, "gamma"_a.none(), "gamma_dtype"_a.none(), "beta_dtype"_a.none(), "measured"_a);
  m.def("quick_tensor_forward", &quick_tensor_forward, "x"_a, "mean"_a.none(), "var"_a.none(),
        "weight"_a.none(), "bias"_a.none(), "training"_a, "keep"_a, "eps"_a.none(),
        "group_size"_a, "activation"_a, "slope"_a.none());
  m.def("quick_tensor_backward", &quick_tensor_backward, "grad_y"_a, "x"_a, "statistics"_a,
        "weight"_a.none(), "bias"_a.none(), "measured"_a, "need_x"_a, "need_weight"_a,
        "need_bias"_a, "eps"_a, "group_size"_a, "activation"_a, "slope"_a);
}
