// What fused_lora._native offers Python. One unit: every other would parse pybind11 again.

#include "bindings/lora_grad.h"
#include "bindings/lora_linear.h"
#include "bindings/lora_merge.h"

namespace py = pybind11;
using namespace fused_lora;

namespace {

void bind_common(py::module_& m) {
  m.attr("archs") = FUSED_LORA_ARCHS;

  py::enum_<DType>(m, "DType", py::module_local())
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16);
  py::enum_<Activation>(m, "Activation", py::module_local())
      .value("none", Activation::kNone)
      .value("erf", Activation::kErf)
      .value("tanh", Activation::kTanh);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CUDA kernels of fused_lora as functions of raw device pointers.";
  bind_common(m);
  bind_lora_merge(m);
  bind_lora_grad(m);
  bind_add_partials(m);
  bind_lora_linear(m);
}
