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
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.blocks), config.blockDim = dim3(kLinearThreads);
  config.dynamicSmemBytes = plan.smem_bytes, config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = plan.cluster > 1 ? 1 : 0;
  void* pointers[] = {&arguments};
  return cudaLaunchKernelExC(&config, kernel, pointers);
}

}  // namespace fused_lora::sm90
