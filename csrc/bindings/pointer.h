// Pointers and streams travel as integers. Types are local to the module, so that the tests' build
// of it for a CPU can be loaded beside it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace fused_lora {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace fused_lora
