// NumPy arrays, read where they lie. The buffer protocol takes as long per array as a small kernel, so
// this reads the fields of an array object itself, whose order is part of NumPy's binary interface
// (PyArrayObject_fields). `use` compares what it reads of a probe with what Python sees.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace numpy {

namespace nb = nanobind;

struct ArrayObject {
  PyObject head;
  char* data;
  int rank;
  Py_ssize_t *shape, *strides;  // in bytes
  PyObject *base, *dtype;
  int flags;
};
constexpr int is_aligned = 0x100, is_writeable = 0x400;

// What Python has registered; null until then. dtypes are in the order of bn::DType, with uint16 for the
// bits of bfloat16.
struct Registered {
  PyTypeObject* type = nullptr;
  PyObject* dtypes[4] = {};
  PyObject *empty = nullptr, *empty_like = nullptr;
};
inline Registered registered;

inline bool is_array(nb::handle object) {
  return registered.type && Py_TYPE(object.ptr()) == registered.type;  // no subclass
}

// False if the core cannot read the array.
inline bool read(nb::handle object, bool writable, bn::Array* a) {
  const auto& o = *reinterpret_cast<const ArrayObject*>(object.ptr());
  if (!(o.flags & is_aligned) || (writable && !(o.flags & is_writeable)) || o.rank < 1 ||
      o.rank > bn::max_rank)
    return false;
  int code = 0;
  while (code < 4 && registered.dtypes[code] != o.dtype) ++code;
  if (code == 4) return false;
  a->dtype = bn::DType(code);
  a->data = o.data;
  a->rank = o.rank;
  const bn::index size = bn::size_of(a->dtype);
  for (int d = 0; d < o.rank; ++d) {
    if (o.strides[d] % size) return false;
    a->shape[d] = o.shape[d];
    a->stride[d] = o.strides[d] / size;
  }
  return a->find_memory();
}

// Whether NumPy's arrays can be read where they lie. `probe` has this shape and these strides.
inline bool use(nb::handle type, nb::handle dtypes, nb::handle empty, nb::handle empty_like,
                nb::handle probe, std::uintptr_t address, std::vector<bn::index> shape,
                std::vector<bn::index> strides) {
  registered.type = reinterpret_cast<PyTypeObject*>(type.ptr());
  for (int k = 0; k < 4; ++k) registered.dtypes[k] = dtypes[k].inc_ref().ptr();
  registered.empty = empty.inc_ref().ptr();
  registered.empty_like = empty_like.inc_ref().ptr();
  type.inc_ref();
  bn::Array a;
  bool right = is_array(probe) && read(probe, true, &a) &&
               a.data == reinterpret_cast<char*>(address) && a.rank == int(shape.size());
  for (int d = 0; right && d < a.rank; ++d)
    right = a.shape[d] == shape[std::size_t(d)] && a.stride[d] == strides[std::size_t(d)];
  if (!right) registered.type = nullptr;
  return right;
}

}  // namespace numpy
