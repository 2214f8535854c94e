#include <cuda.h>
#include <cuda_runtime_api.h>

#include "common/device_guard.h"

namespace fused_lora {
namespace {

// Asked of the driver when first needed: the module is not linked against one.
template <typename Function>
Function find(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  const bool there = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return there ? reinterpret_cast<Function>(function) : nullptr;
}

}  // namespace

void* CudaDriver::context() {
  static const auto get = find<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent");
  CUcontext context = nullptr;
  return get && get(&context) == CUDA_SUCCESS ? context : nullptr;
}

void CudaDriver::set_context(void* context) {
  static const auto set = find<decltype(&cuCtxSetCurrent)>("cuCtxSetCurrent");
  if (set) set(static_cast<CUcontext>(context));
}

int CudaDriver::set_device(int device) { return cudaSetDevice(device); }

}  // namespace fused_lora
