#pragma once

#include <nanobind/nanobind.h>

// Add the functions of quick.cpp to the module.
void define_quick(nanobind::module_& m);
