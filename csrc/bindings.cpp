// The core as a Python module: converts, forwards, computes nothing.
//
// An array argument is a NumPy array (bfloat16 travels as its uint16 bits) or another object with the
// buffer protocol, a framework's own tensor where the framework has DLPack's C exchange, or a tuple
// (address, dtype code, shape, strides in elements): one build serves every version of every framework.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "foreign_tensor.hpp"
#include "kernels.hpp"
#include "layer.hpp"
#include "machine.hpp"
#include "numpy_array.hpp"
#include "quick.hpp"
#include "scattered.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using bn::Array;
using bn::DType;
using bn::index;

class View {
 public:
  View(nb::handle object, bool writable, const char* name) {
    if (object.is_none()) return;
    if (foreign::is_tensor(object))
      from_foreign(object, name);
    else if (numpy::is_array(object) && numpy::read(object, writable, &array_))
      ;
    else if (nb::isinstance<nb::tuple>(object))
      from_address(nb::borrow<nb::tuple>(object), name);
    else
      from_buffer(object, writable, name);
    if (!array_.find_memory())
      throw nb::value_error((std::string(name) + ": must have memory for its values, got an array "
                             "without any, as of a tensor whose storage was freed by untyped_storage().resize_(0). "
                             "Restore it first.").c_str());
  }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  ~View() {
    if (held_) PyBuffer_Release(&buffer_);
  }
  const Array& array() const { return array_; }

 private:
  void from_foreign(nb::handle object, const char* name) {
    if (!foreign::read(object, &array_))
      throw nb::value_error((std::string(name) + ": not a tensor that the core reads").c_str());
  }

  void from_address(nb::tuple t, const char* name) {
    if (t.size() != 4) throw nb::value_error((std::string(name) + ": not a 4-tuple").c_str());
    array_.data = reinterpret_cast<char*>(nb::cast<std::uintptr_t>(t[0]));
    array_.dtype = DType(nb::cast<int>(t[1]));
    const nb::tuple shape = nb::cast<nb::tuple>(t[2]), stride = nb::cast<nb::tuple>(t[3]);
    set_rank(int(shape.size()), name);
    for (int d = 0; d < array_.rank; ++d) {
      array_.shape[d] = nb::cast<index>(shape[d]);
      array_.stride[d] = nb::cast<index>(stride[d]);
    }
  }

  void from_buffer(nb::handle object, bool writable, const char* name) {
    const int flags = PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object.ptr(), &buffer_, flags)) throw nb::python_error();
    held_ = true;
    array_.data = static_cast<char*>(buffer_.buf);
    // NumPy writes the sign of this machine's byte order where a type was given with one.
    const std::uint16_t one = 1;
    const char sign = *reinterpret_cast<const char*>(&one) ? '<' : '>';
    const char* format = buffer_.format ? buffer_.format : "B";
    switch (*format == sign ? format[1] : *format) {
      case 'f': array_.dtype = DType::f32; break;
      case 'd': array_.dtype = DType::f64; break;
      case 'e': array_.dtype = DType::f16; break;
      case 'H': array_.dtype = DType::bf16; break;
      default: throw nb::type_error((std::string(name) + ": unsupported buffer format").c_str());
    }
    set_rank(buffer_.ndim, name);
    for (int d = 0; d < array_.rank; ++d) {
      array_.shape[d] = buffer_.shape[d];
      if (buffer_.strides[d] % buffer_.itemsize)
        throw nb::value_error((std::string(name) + ": strides are not whole elements").c_str());
      array_.stride[d] = buffer_.strides[d] / buffer_.itemsize;
    }
  }

  void set_rank(int rank, const char* name) {
    if (rank < 1 || rank > bn::max_rank)
      throw nb::value_error((std::string(name) + ": unsupported number of axes").c_str());
    array_.rank = rank;
  }

  Array array_;
  Py_buffer buffer_ = {};
  bool held_ = false;
};

// A per-channel vector of float64, or nothing.
class Channels {
 public:
  Channels(nb::handle object, index channels, const char* name, bool writable = false)
      : view_(object, writable, name) {
    const Array& a = view_.array();
    if (!a) return;
    if (a.rank != 1 || a.shape[0] != channels || a.dtype != DType::f64 ||
        (channels > 1 && a.stride[0] != 1))
      throw nb::value_error((std::string(name) + ": not a float64 vector of one per channel").c_str());
  }
  double* data() const { return reinterpret_cast<double*>(view_.array().data); }

 private:
  View view_;
};

index channels_of(const View& x, int axis) {
  const Array& a = x.array();
  if (axis < 0 || axis >= a.rank) throw nb::value_error("channel_axis out of range");
  return a.shape[axis];
}

void same_shape(const View& x, const View& other, const char* name, bool same_dtype = true) {
  const Array &a = x.array(), &b = other.array();
  if (!b) return;
  bool same = a.rank == b.rank && (!same_dtype || a.dtype == b.dtype);
  for (int d = 0; same && d < a.rank; ++d) same = a.shape[d] == b.shape[d];
  if (!same) throw nb::value_error((std::string(name) + ": not the shape and type of x").c_str());
}

void check_weights(const View& x, const View& w) {
  same_shape(x, w, "weights", false);
  if (w.array() && w.array().dtype != DType::f64)
    throw nb::value_error("weights: not float64");
}

// `sum`: the residual, or in the backward pass the y that takes the place of z.
bn::Epilogue epilogue_of(int activation, double slope, const View& sum) {
  bn::Epilogue e;
  if (activation < 0 || activation > 5) throw nb::value_error("activation: unknown code");
  e.activation = bn::Activation(activation);
  if (sum.array() && e.activation >= bn::Activation::hardswish)
    throw nb::value_error("activation: hardswish and silu cannot follow a residual");
  e.slope = slope;
  return e;
}

nb::tuple forward(nb::handle x, nb::handle y, int axis, double eps, nb::handle mean,
                  nb::handle mean_low, nb::handle m2, nb::handle gamma, nb::handle beta,
                  nb::handle weights, nb::handle residual, int activation, double slope) {
  const View vx(x, false, "x"), vy(y, true, "y"), vw(weights, false, "weights"),
      vr(residual, false, "residual");
  const index c = channels_of(vx, axis);
  same_shape(vx, vy, "y");
  same_shape(vx, vr, "residual");
  check_weights(vx, vw);
  const Channels m(mean, c, "mean", true), low(mean_low, c, "mean_low", true),
      s(m2, c, "m2", true), g(gamma, c, "gamma"), b(beta, c, "beta");
  const bn::Epilogue e = epilogue_of(activation, slope, vr);
  bn::Count count;
  {
    nb::gil_scoped_release released;
    count = bn::forward(vx.array(), vr.array(), vw.array(), vy.array(), axis, eps,
                        {g.data(), b.data()}, e, m.data(), low.data(), s.data());
  }
  return nb::make_tuple(count.count, count.dof);
}

void normalize(nb::handle x, nb::handle y, int axis, nb::handle mean, nb::handle mean_low,
               nb::handle var, double eps, nb::handle gamma, nb::handle beta, nb::handle weights,
               nb::handle residual, int activation, double slope) {
  const View vx(x, false, "x"), vy(y, true, "y"), vw(weights, false, "weights"),
      vr(residual, false, "residual");
  const index c = channels_of(vx, axis);
  same_shape(vx, vy, "y");
  same_shape(vx, vr, "residual");
  check_weights(vx, vw);
  const Channels m(mean, c, "mean"), low(mean_low, c, "mean_low"), v(var, c, "var"),
      g(gamma, c, "gamma"), b(beta, c, "beta");
  const bn::Epilogue e = epilogue_of(activation, slope, vr);
  nb::gil_scoped_release released;
  bn::normalize(vx.array(), vr.array(), vw.array(), vy.array(), axis,
                {m.data(), low.data(), v.data(), eps}, {g.data(), b.data()}, e);
}

enum class Pass { sums, apply, both };

void backward(Pass pass, nb::handle grad_y, nb::handle x, nb::handle grad_x, int axis,
              double count, nb::handle mean, nb::handle mean_low, nb::handle var, double eps,
              nb::handle sum_grad, nb::handle sum_grad_x_hat, nb::handle gamma, nb::handle beta,
              nb::handle weights, nb::handle y, nb::handle grad_residual, int activation,
              double slope) {
  const View vx(x, false, "x"), vg(grad_y, false, "grad_y"), vo(grad_x, true, "grad_x"),
      vw(weights, false, "weights"), vy(y, false, "y"),
      vgr(grad_residual, true, "grad_residual");
  const index c = channels_of(vx, axis);
  same_shape(vx, vg, "grad_y");
  same_shape(vx, vo, "grad_x");
  same_shape(vx, vy, "y");
  same_shape(vx, vgr, "grad_residual");
  check_weights(vx, vw);
  const Channels m(mean, c, "mean"), low(mean_low, c, "mean_low"), v(var, c, "var"),
      g(gamma, c, "gamma"), b(beta, c, "beta"),
      s1(sum_grad, c, "sum_grad", pass != Pass::apply),
      s2(sum_grad_x_hat, c, "sum_grad_x_hat", pass != Pass::apply);
  const bn::Epilogue e = epilogue_of(activation, slope, vy);
  const bn::Statistics st{m.data(), low.data(), v.data(), eps};
  const bn::Affine af{g.data(), b.data()};
  nb::gil_scoped_release released;
  if (pass == Pass::sums)
    bn::backward_sums(vg.array(), vx.array(), vy.array(), vw.array(), axis, st, af, e, s1.data(),
                      s2.data());
  else if (pass == Pass::apply)
    bn::backward(vg.array(), vx.array(), vy.array(), vw.array(), vo.array(), vgr.array(), axis,
                 count, st, af, e, s1.data(), s2.data());
  else
    bn::backward_fused(vg.array(), vx.array(), vy.array(), vw.array(), vo.array(), vgr.array(),
                       axis, count, st, af, e, s1.data(), s2.data());
}

void copy(nb::handle to, nb::handle from) {
  const View a(to, true, "to"), b(from, false, "from");
  same_shape(b, a, "to");
  index expected = 1;
  for (int d = a.array().rank - 1; d >= 0; --d) {
    for (const View* v : {&a, &b})
      if (v->array().shape[d] != 1 && v->array().stride[d] != expected)
        throw nb::value_error("copy: arrays must be C-contiguous");
    expected *= a.array().shape[d];
  }
  nb::gil_scoped_release released;
  bn::copy(a.array().data, b.array().data,
           std::size_t(expected * bn::size_of(a.array().dtype)));
}

// ---- layers -------------------------------------------------------------------------------------

// A per-channel vector of any type, or nothing. Any number of channels will do if that is -1.
class Parameter {
 public:
  Parameter(nb::handle object, index channels, const char* name, bool writable = false)
      : view_(object, writable, name) {
    const Array& a = view_.array();
    if (a ? a.rank != 1 || (channels >= 0 && a.shape[0] != channels) : channels < 0)
      throw nb::value_error((std::string(name) + ": not one value per channel").c_str());
  }
  const Array& array() const { return view_.array(); }

 private:
  View view_;
};

// Statistics of `groups` groups in one block (layer.hpp).
class StatisticsBlock {
 public:
  StatisticsBlock(nb::handle object, index channels, bool writable)
      : view_(object, writable, "statistics") {
    const Array& a = view_.array();
    if (a.rank != 3 || a.dtype != DType::f64 || a.shape[1] != bn::statistics_rows ||
        a.shape[2] != channels)
      throw nb::value_error("statistics: not float64 of shape (groups, 5, C)");
    index expected = 1;
    for (int d = 2; d >= 0; expected *= a.shape[d], --d)
      if (a.shape[d] > 1 && a.stride[d] != expected)
        throw nb::value_error("statistics: not contiguous");
  }
  double* data() const { return reinterpret_cast<double*>(view_.array().data); }
  index groups() const { return view_.array().shape[0]; }

 private:
  View view_;
};

bn::Groups groups_of(const StatisticsBlock& s, index size, const View& x) {
  const index n = s.groups();
  if (n < 1 || (n > 1 && (size < 1 || (n - 1) * size >= x.array().shape[0])))
    throw nb::value_error("group_size: does not cut the examples into that many groups");
  return {n, size};
}

enum class Layer { forward, normalize };

void layer(Layer pass, nb::handle x, nb::handle y, int axis, double eps, nb::handle statistics,
           index group_size, nb::handle gamma, nb::handle beta, nb::handle weights,
           nb::handle residual, int activation, double slope) {
  const View vx(x, false, "x"), vy(y, true, "y"), vw(weights, false, "weights"),
      vr(residual, false, "residual");
  const index c = channels_of(vx, axis);
  same_shape(vx, vy, "y");
  same_shape(vx, vr, "residual");
  check_weights(vx, vw);
  const Parameter g(gamma, c, "gamma"), b(beta, c, "beta");
  const StatisticsBlock s(statistics, c, pass == Layer::forward);
  const bn::Groups groups = groups_of(s, group_size, vx);
  const bn::Epilogue e = epilogue_of(activation, slope, vr);
  nb::gil_scoped_release released;
  if (pass == Layer::forward)
    bn::layer_forward(vx.array(), vr.array(), vw.array(), vy.array(), axis, eps,
                      {g.array(), b.array()}, e, groups, s.data());
  else
    bn::layer_normalize(vx.array(), vr.array(), vw.array(), vy.array(), axis, eps,
                        {g.array(), b.array()}, e, groups, s.data());
}

void layer_backward(nb::handle grad_y, nb::handle x, nb::handle grad_x, int axis, double eps,
                    nb::handle statistics, bool measured, index group_size, nb::handle gamma,
                    nb::handle beta, nb::handle grad_gamma, nb::handle grad_beta,
                    nb::handle weights, nb::handle y, nb::handle grad_residual, int activation,
                    double slope) {
  const View vx(x, false, "x"), vg(grad_y, false, "grad_y"), vo(grad_x, true, "grad_x"),
      vw(weights, false, "weights"), vy(y, false, "y"),
      vgr(grad_residual, true, "grad_residual");
  const index c = channels_of(vx, axis);
  same_shape(vx, vg, "grad_y");
  same_shape(vx, vo, "grad_x");
  same_shape(vx, vy, "y");
  same_shape(vx, vgr, "grad_residual");
  check_weights(vx, vw);
  if (vgr.array() && !vo.array()) throw nb::value_error("grad_residual: not without grad_x");
  const Parameter g(gamma, c, "gamma"), b(beta, c, "beta"),
      gg(grad_gamma, c, "grad_gamma", true), gb(grad_beta, c, "grad_beta", true);
  const StatisticsBlock s(statistics, c, false);
  const bn::Groups groups = groups_of(s, group_size, vx);
  const bn::Epilogue e = epilogue_of(activation, slope, vy);
  nb::gil_scoped_release released;
  bn::layer_backward(vg.array(), vx.array(), vy.array(), vw.array(), vo.array(), vgr.array(), axis,
                     eps, {g.array(), b.array()}, e, groups, s.data(), measured, gg.array(),
                     gb.array());
}

// Counts are one, or one per channel.
void merge(nb::handle count_a, nb::handle mean_a, nb::handle m2_a, nb::handle count_b,
           nb::handle mean_b, nb::handle m2_b, nb::handle mean, nb::handle m2) {
  const Parameter first(mean, -1, "mean", true);
  const index c = first.array().shape[0];
  const auto step = [c](const Parameter& v) { return v.array().shape[0] == c && c != 1 ? 1 : 0; };
  const Parameter any_a(count_a, -1, "count_a"), any_b(count_b, -1, "count_b");
  const index of_a = step(any_a), of_b = step(any_b);
  const Channels ca(count_a, of_a ? c : 1, "count_a"), ma(mean_a, c, "mean_a"), sa(m2_a, c, "m2_a"),
      cb(count_b, of_b ? c : 1, "count_b"), mb(mean_b, c, "mean_b"), sb(m2_b, c, "m2_b"),
      out_mean(mean, c, "mean", true), out_m2(m2, c, "m2", true);
  bn::merge({ca.data(), ma.data(), sa.data(), of_a}, {cb.data(), mb.data(), sb.data(), of_b}, c,
            out_mean.data(), out_m2.data());
}

// A C-contiguous vector of int32 or int64, or nothing.
class Integers {
 public:
  Integers(nb::handle object, const char* name) {
    if (object.is_none()) return;
    if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_ND | PyBUF_FORMAT)) throw nb::python_error();
    held_ = true;
    const bool whole = buffer_.format && std::string("ilq").find(buffer_.format[0]) != std::string::npos;
    if (buffer_.ndim != 1 || !whole || (buffer_.itemsize != 4 && buffer_.itemsize != 8)) {
      PyBuffer_Release(&buffer_);
      throw nb::type_error((std::string(name) + ": not a vector of int32 or int64").c_str());
    }
  }
  Integers(const Integers&) = delete;
  Integers& operator=(const Integers&) = delete;
  ~Integers() {
    if (held_) PyBuffer_Release(&buffer_);
  }
  index size() const { return held_ ? buffer_.shape[0] : -1; }
  const std::int32_t* narrow() const { return of_size<std::int32_t>(); }
  const std::int64_t* wide() const { return of_size<std::int64_t>(); }

 private:
  template <class T>
  const T* of_size() const {
    return held_ && buffer_.itemsize == sizeof(T) ? static_cast<const T*>(buffer_.buf) : nullptr;
  }
  Py_buffer buffer_ = {};
  bool held_ = false;
};

void moments_of_entries(nb::handle values, nb::handle starts, nb::handle places, index rows,
                        index columns, bool by_row, nb::handle weights, nb::handle count,
                        nb::handle mean, nb::handle m2, nb::handle missing, nb::handle stored,
                        nb::handle stored_low) {
  const View x(values, false, "values");
  const Integers s(starts, "starts"), p(places, "places");
  const Array& a = x.array();
  if (a.rank != 1 || (a.shape[0] > 1 && a.stride[0] != 1))
    throw nb::value_error("values: not a contiguous vector");
  if (!s.wide() || s.size() < 1) throw nb::value_error("starts: not int64, or empty");
  if (p.size() >= 0 && p.size() != a.shape[0])
    throw nb::value_error("places: not one for each value");
  const Channels w(weights, rows, "weights"), n(count, columns, "count", true),
      m(mean, columns, "mean", true), d(m2, columns, "m2", true),
      gaps(missing, columns, "missing", true), all(stored, columns, "stored", true),
      low(stored_low, columns, "stored_low", true);
  nb::gil_scoped_release released;
  bn::moments_of_entries({a, s.wide(), s.size() - 1, rows, columns, by_row, p.narrow(), p.wide(),
                          w.data()},
                         {n.data(), m.data(), d.data(), gaps.data(), all.data(), low.data()});
}

index given_statistics(nb::handle mean, nb::handle var, nb::handle statistics) {
  const Parameter m(mean, -1, "mean");
  const index c = m.array().shape[0];
  const Parameter v(var, c, "var");
  return bn::given_statistics(m.array(), v.array(), StatisticsBlock(statistics, c, true).data());
}

index update_running(nb::handle statistics, nb::handle mean, nb::handle var,
                     std::uintptr_t tracked, double momentum, bool even_if_not_finite,
                     bool count_empty) {
  const Parameter m(mean, -1, "mean", true);
  const index c = m.array().shape[0];
  const Parameter v(var, c, "var", true);
  return bn::update_running(StatisticsBlock(statistics, c, false).data(), m.array(), v.array(),
                            reinterpret_cast<std::int64_t*>(tracked), momentum,
                            even_if_not_finite, count_empty);
}

}  // namespace

NB_MODULE(_core, m) {
  nb::register_exception_translator(
      [](const std::exception_ptr& p, void*) {
        try {
          std::rethrow_exception(p);
        } catch (const bn::BadCall& e) {
          PyErr_SetString(PyExc_ValueError, e.what());
        }
      });

  m.def("forward", &forward, "x"_a, "y"_a.none(), "channel_axis"_a, "eps"_a, "mean"_a,
        "mean_low"_a, "m2"_a, "gamma"_a = nb::none(), "beta"_a = nb::none(),
        "weights"_a = nb::none(), "residual"_a = nb::none(), "activation"_a = 0,
        "slope"_a = 0.01,
        "Statistics of x into mean, mean_low, m2, and y unless it is None; returns (count, dof).");
  m.def("normalize", &normalize, "x"_a, "y"_a, "channel_axis"_a, "mean"_a, "mean_low"_a.none(),
        "var"_a, "eps"_a, "gamma"_a = nb::none(), "beta"_a = nb::none(),
        "weights"_a = nb::none(), "residual"_a = nb::none(), "activation"_a = 0,
        "slope"_a = 0.01);

  m.def(
      "backward_sums",
      [](nb::handle grad_y, nb::handle x, int axis, nb::handle mean, nb::handle mean_low,
         nb::handle var, double eps, nb::handle sum_grad, nb::handle sum_grad_x_hat,
         nb::handle gamma, nb::handle beta, nb::handle weights, nb::handle y,
         int activation, double slope) {
        backward(Pass::sums, grad_y, x, nb::none(), axis, 0, mean, mean_low, var, eps, sum_grad,
                 sum_grad_x_hat, gamma, beta, weights, y, nb::none(), activation, slope);
      },
      "grad_y"_a, "x"_a, "channel_axis"_a, "mean"_a, "mean_low"_a.none(), "var"_a, "eps"_a,
      "sum_grad"_a, "sum_grad_x_hat"_a, "gamma"_a = nb::none(), "beta"_a = nb::none(),
      "weights"_a = nb::none(), "y"_a = nb::none(), "activation"_a = 0, "slope"_a = 0.01);
  const auto applied = [](Pass pass) {
    return [pass](nb::handle grad_y, nb::handle x, nb::handle grad_x, int axis, double count,
                  nb::handle mean, nb::handle mean_low, nb::handle var, double eps,
                  nb::handle sum_grad, nb::handle sum_grad_x_hat, nb::handle gamma,
                  nb::handle beta, nb::handle weights, nb::handle y,
                  nb::handle grad_residual, int activation, double slope) {
      backward(pass, grad_y, x, grad_x, axis, count, mean, mean_low, var, eps, sum_grad,
               sum_grad_x_hat, gamma, beta, weights, y, grad_residual, activation, slope);
    };
  };
  const auto define = [&](const char* name, Pass pass) {
    m.def(name, applied(pass), "grad_y"_a, "x"_a, "grad_x"_a, "channel_axis"_a, "count"_a,
          "mean"_a, "mean_low"_a.none(), "var"_a, "eps"_a, "sum_grad"_a, "sum_grad_x_hat"_a,
          "gamma"_a = nb::none(), "beta"_a = nb::none(), "weights"_a = nb::none(),
          "y"_a = nb::none(), "grad_residual"_a = nb::none(), "activation"_a = 0,
          "slope"_a = 0.01);
  };
  define("backward", Pass::apply);         // the sums are given
  define("backward_fused", Pass::both);    // the sums are made

  const auto define_layer = [&](const char* name, Layer pass) {
    m.def(
        name,
        [pass](nb::handle x, nb::handle y, int axis, double eps, nb::handle statistics,
               bn::index group_size, nb::handle gamma, nb::handle beta, nb::handle weights,
               nb::handle residual, int activation, double slope) {
          layer(pass, x, y, axis, eps, statistics, group_size, gamma, beta, weights, residual,
                activation, slope);
        },
        "x"_a, "y"_a, "channel_axis"_a, "eps"_a, "statistics"_a, "group_size"_a = 0,
        "gamma"_a = nb::none(), "beta"_a = nb::none(), "weights"_a = nb::none(),
        "residual"_a = nb::none(), "activation"_a = 0, "slope"_a = 0.01);
  };
  define_layer("layer_forward", Layer::forward);      // the statistics are made
  define_layer("layer_normalize", Layer::normalize);  // the statistics are given
  m.def("layer_backward", &layer_backward, "grad_y"_a, "x"_a, "grad_x"_a.none(), "channel_axis"_a,
        "eps"_a, "statistics"_a, "measured"_a, "group_size"_a = 0, "gamma"_a = nb::none(),
        "beta"_a = nb::none(), "grad_gamma"_a = nb::none(), "grad_beta"_a = nb::none(),
        "weights"_a = nb::none(), "y"_a = nb::none(), "grad_residual"_a = nb::none(),
        "activation"_a = 0, "slope"_a = 0.01);
  m.def("merge", &merge, "count_a"_a, "mean_a"_a, "m2_a"_a, "count_b"_a, "mean_b"_a, "m2_b"_a,
        "mean"_a, "m2"_a);
  m.def("moments_of_entries", &moments_of_entries, "values"_a, "starts"_a, "places"_a.none(),
        "rows"_a, "columns"_a, "by_row"_a, "weights"_a.none(), "count"_a, "mean"_a, "m2"_a,
        "missing"_a, "stored"_a, "stored_low"_a);
  m.def("given_statistics", &given_statistics, "mean"_a, "var"_a, "statistics"_a,
        "The first channel of negative variance, or -1.");
  m.def("update_running", &update_running, "statistics"_a, "mean"_a, "var"_a, "tracked"_a,
        "momentum"_a, "even_if_not_finite"_a, "count_empty"_a,
        "The first channel that is not finite, or -1. `tracked`: address of an int64, or 0.");

  define_quick(m);
  m.def("use_numpy", &numpy::use, "type"_a, "dtypes"_a, "empty"_a, "empty_like"_a, "probe"_a,
        "address"_a, "shape"_a, "strides"_a);
  m.def("use_exchange", &foreign::use, "type"_a, "parameter"_a, "exchange"_a, "empty_like"_a,
        "of_any"_a, "is_neg"_a, "small"_a,
        "Take tensors of this type as they are, by the type's __dlpack_c_exchange_api__.");
  m.def("prepare_output", [](std::uintptr_t address, std::size_t bytes) {
    bn::prepare_output(reinterpret_cast<void*>(address), bytes);
  }, "address"_a, "bytes"_a);
  m.def("copy", &copy, "to"_a, "from_"_a, "A parallel memcpy of C-contiguous arrays.");

  m.def("instruction_sets", &bn::instruction_sets);
  m.def("instruction_set", &bn::instruction_set);
  m.def("use_instruction_set", &bn::use_instruction_set, "name"_a);
  m.def("has_openmp", &bn::has_openmp);
  m.def("threads", &bn::threads);
  m.def("last_level_cache", &bn::last_level_cache);
  m.def("assume_last_level_cache", &bn::assume_last_level_cache, "bytes"_a,
        "For tests: what is larger than this is written past the cache. Negative: the machine's.");
}
