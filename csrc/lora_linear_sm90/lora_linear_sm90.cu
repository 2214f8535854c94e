#include <cuda_runtime_api.h>

#include "lora_linear_sm90/extended.h"

namespace fused_lora::sm90 {
namespace {

template <typename T,             // of every matrix
          typename Tile,          // LinearTile
          Right right,            // how w and the borders lie
          Activation activation>  // after the bias
__global__ void __launch_bounds__(kLinearThreads, 1)
    lora_linear_kernel(const __grid_constant__ LinearArguments arguments) {
  extern __shared__ char shared[];
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  Extended<T, Tile, right, activation>(arguments, shared, blockIdx.x, gridDim.x).run();
#endif
}

using Kernel = void (*)(LinearArguments);

template <typename T, typename Tile>
Kernel kernel_of(const LinearShape& shape) {
  constexpr Right kRows = Right::kRows;
  if (shape.right == Right::kColumns) {
    return lora_linear_kernel<T, Tile, Right::kColumns, Activation::kNone>;
  }
  switch (shape.activation) {
    case Activation::kErf: return lora_linear_kernel<T, Tile, kRows, Activation::kErf>;
    case Activation::kTanh: return lora_linear_kernel<T, Tile, kRows, Activation::kTanh>;
    default: return lora_linear_kernel<T, Tile, kRows, Activation::kNone>;
  }
}

// The kernel of a plan's tile.
struct Find {
  const LinearPlan& plan;
  DType type;
  Kernel* kernel;

  template <typename Tile>
  void operator()() const {
    if (plan.tile_rows != Tile::kRows || plan.tile_columns != Tile::kColumns) return;
    *kernel = type == DType::kBFloat16 ? kernel_of<BFloat16, Tile>(plan.shape)
                                       : kernel_of<Float16, Tile>(plan.shape);
  }
};

}  // namespace

int launch_lora_linear(const LinearProblem& problem, const LinearPlan& plan, int device,
                       void* stream) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  LinearArguments arguments = {};
  if (const int error = make_arguments(problem, plan, &arguments)) return error;
  Kernel kernel = nullptr;
  each_linear_tile(Find{plan, problem.type, &kernel});
  const void* function = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t error = cudaFuncSetAttribute(
          function, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.smem_bytes)) {
    return error;
  }
  void* pointers[] = {&arguments};
  return cudaLaunchKernel(function, dim3(plan.blocks), dim3(kLinearThreads), pointers,
                          plan.smem_bytes, static_cast<cudaStream_t>(stream));
}

}  // namespace fused_lora::sm90
