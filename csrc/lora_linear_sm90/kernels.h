// The kernels of one 16-bit type. Each type is a unit of its own, so that two compile at once.
#pragma once

#include "lora_linear_sm90/extended.h"

namespace fused_lora::sm90 {
namespace {

template <typename T,             // of every matrix
          typename Tile,          // LinearTile
          Right right,            // how w and the borders lie
          Activation activation>  // after the bias; by columns its derivative
__global__ void __launch_bounds__(kLinearThreads, 1)
    lora_linear_kernel(const __grid_constant__ LinearArguments arguments) {
  extern __shared__ char shared[];
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  Extended<T, Tile, right, activation>(arguments, shared, blockIdx.x, gridDim.x).run();
#endif
}

// The kernel of a plan.
template <typename T>
struct Find {
  const LinearPlan& plan;
  const void** kernel;

  template <typename Tile>
  void operator()() const {
    if (has_tile<Tile>(plan)) *kernel = reinterpret_cast<const void*>(of_tile<Tile>());
  }

  template <typename Tile>
  auto of_tile() const {
    const bool rows = plan.shape.right == Right::kRows;
    return rows ? of_side<Tile, Right::kRows>() : of_side<Tile, Right::kColumns>();
  }

  template <typename Tile, Right right>
  auto of_side() const {
    switch (plan.shape.activation) {
      case Activation::kErf: return &lora_linear_kernel<T, Tile, right, Activation::kErf>;
      case Activation::kTanh: return &lora_linear_kernel<T, Tile, right, Activation::kTanh>;
      default: return &lora_linear_kernel<T, Tile, right, Activation::kNone>;
    }
  }
};

}  // namespace

template <typename T>
const void* kernel_of(const LinearPlan& plan) {
  const void* kernel = nullptr;
  each_linear_tile(Find<T>{plan, &kernel});
  return kernel;
}

}  // namespace fused_lora::sm90
