// A framework's tensors, read by DLPack's C exchange (dlpack.h, version 1) where the framework has
// it: asking Python for address, shape and strides takes longer than a small kernel.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "kernels.hpp"

namespace foreign {

namespace nb = nanobind;

struct Tensor {  // DLTensor
  void* data;
  std::int32_t device_type, device_id, rank;
  std::uint8_t type_code, type_bits;
  std::uint16_t lanes;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

struct Exchange {  // DLPackExchangeAPI
  std::uint32_t major, minor;
  Exchange* older;
  void *allocate, *from_object, *to_object;
  int (*tensor_from_object)(void* object, Tensor* out);
};

// What Python has registered; null until then.
struct Registered {
  PyTypeObject *type = nullptr, *parameter = nullptr;  // the second a subclass of the first
  const Exchange* exchange = nullptr;
  PyObject *empty_like = nullptr, *of_any = nullptr;  // of contiguous tensors below `small`; of any
  PyObject* is_neg = nullptr;
  bn::index small = 0;  // bytes
};
inline Registered registered;

inline bool is_tensor(nb::handle object) {
  return registered.type && PyObject_TypeCheck(object.ptr(), registered.type);
}

// False if the core cannot read the tensor. It may lack memory. Raises what the framework raises.
inline bool read(nb::handle object, bn::Array* a) {
  constexpr int cpu = 1, floating = 2, brain_floating = 4;
  Tensor t;
  if (registered.exchange->tensor_from_object(object.ptr(), &t)) throw nb::python_error();
  const int bits = t.lanes == 1 ? t.type_bits : 0;
  if (t.type_code == brain_floating && bits == 16)
    a->dtype = bn::DType::bf16;
  else if (t.type_code == floating && (bits == 16 || bits == 32 || bits == 64))
    a->dtype = bits == 16 ? bn::DType::f16 : bits == 32 ? bn::DType::f32 : bn::DType::f64;
  else
    return false;
  if (t.device_type != cpu || t.rank < 1 || t.rank > bn::max_rank) return false;
  a->data = t.data ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
  a->rank = t.rank;
  for (int d = 0; d < t.rank; ++d) {
    a->shape[d] = t.shape[d];
    a->stride[d] = t.strides[d];
  }
  return true;
}

inline void use(nb::handle type, nb::handle parameter, nb::handle capsule, nb::handle empty_like,
                nb::handle of_any, nb::handle is_neg, bn::index small) {
  constexpr std::uint32_t known = 1;
  const auto* found =
      static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!found) throw nb::python_error();
  while (found && found->major != known) found = found->older;
  if (!found || !PyType_Check(type.ptr())) throw nb::value_error("exchange: unknown version");
  registered.type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
  registered.parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  registered.empty_like = empty_like.inc_ref().ptr();
  registered.of_any = of_any.inc_ref().ptr();
  registered.is_neg = is_neg.inc_ref().ptr();
  registered.small = small;
  registered.exchange = found;
}

}  // namespace foreign
