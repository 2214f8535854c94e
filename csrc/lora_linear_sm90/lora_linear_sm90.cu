#include <cuda_runtime_api.h>

#include "common/device_guard.h"
#include "lora_linear_sm90/arguments.h"

namespace fused_lora::sm90 {

// In kernels_bfloat16.cu and kernels_float16.cu.
template <typename T>
const void* kernel_of(const LinearPlan& plan);

#ifdef FUSED_LORA_SM90A
constexpr bool kCompiled = true;
#else
constexpr bool kCompiled = false;  // the kernels are empty
#endif

int launch_lora_linear(const LinearProblem& problem, const LinearPlan& plan, int device,
                       void* stream) {
  if (!kCompiled) return cudaErrorNoKernelImageForDevice;
  const DeviceGuard guard(device);
  if (const int error = guard.error()) return error;
  LinearArguments arguments = {};
  if (const int error = make_arguments(problem, plan, &arguments)) return error;
  const void* kernel =
      problem.type == DType::kBFloat16 ? kernel_of<BFloat16>(plan) : kernel_of<Float16>(plan);
  if (const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.smem_bytes)) {
    return error;
  }
  void* pointers[] = {&arguments};
  return cudaLaunchKernel(kernel, dim3(plan.blocks), dim3(kLinearThreads), pointers,
                          plan.smem_bytes, static_cast<cudaStream_t>(stream));
}

}  // namespace fused_lora::sm90
