// The bodies of the kernels on one block of one array type, compiled once per instruction set
// (BN_ISA names it). Single-threaded, and free of decisions about accuracy or partition: those are
// driver.cpp's. Forward and backward passes share two loops over two layouts, and differ only in the
// term that a reduction adds or an application writes.
//
// Several files of one instruction set include this and compile side by side. What each has of it
// lies in an unnamed namespace, so that no function of one set can be linked into another; only
// constants named in the namespace of the set are seen from outside.
#pragma once

#if !defined(__GNUC__)
#include <cmath>
#endif
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "half.hpp"
#include "kernels.hpp"

namespace bn {

// The bodies for arrays of one type.
struct Bodies {
  void (*reduce_moments)(const Job&, const Block&, double* out1, double* out2);
  void (*reduce_backward)(const Job&, const Block&, double* out1, double* out2);
  void (*apply_forward)(const Job&, const Block&);
  void (*apply_backward)(const Job&, const Block&);
};

namespace BN_ISA {

// Without weights, the last step at the type's own width: block.cpp.
extern const Bodies f32, f64, f16, bf16;

namespace {

#include "simd.hpp"
#include "columns.hpp"
#include "activation.hpp"
#include "elements.hpp"
#include "reduction.hpp"
#include "application.hpp"

}  // namespace
}  // namespace BN_ISA
}  // namespace bn
