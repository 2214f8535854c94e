#include <cuda_runtime_api.h>

#include "common/device_guard.h"
#include "lora_merge/phases.h"

namespace fused_lora {
namespace {

struct DeviceBlock {
  MergeShared& shared;
  Accumulator sum;

  template <typename Phase>
  FL_DEVICE void each_thread(Phase phase) {
    phase(static_cast<int>(threadIdx.x), sum);
    __syncthreads();
  }
};

template <typename W,    // what w holds
          typename Out,  // what w' is rounded to
          Rounding rounding>
__global__ void __launch_bounds__(kThreads)
    lora_merge_kernel(const MergeItem* items, int count, DType adapter, Noise noise) {
  __shared__ MergeShared shared;
  DeviceBlock block{shared, {}};
  merge_tile<W, Out, rounding>(block, find_tile(items, count, blockIdx.x), adapter, noise);
}

using Kernel = void (*)(const MergeItem*, int, DType, Noise);

template <typename W, typename Out>
Kernel kernel_for(Rounding rounding) {
  if (rounding == Rounding::kNearest) return lora_merge_kernel<W, Out, Rounding::kNearest>;
  return lora_merge_kernel<W, Out, Rounding::kStochastic>;
}

Kernel kernel_for(MergeTypes types, Rounding rounding) {
  if (types.out == DType::kFloat32) return lora_merge_kernel<float, float, Rounding::kNearest>;
  const bool wide = types.w == DType::kFloat32;
  if (types.out == DType::kBFloat16) {
    return wide ? kernel_for<float, BFloat16>(rounding) : kernel_for<BFloat16, BFloat16>(rounding);
  }
  return wide ? kernel_for<float, Float16>(rounding) : kernel_for<Float16, Float16>(rounding);
}

}  // namespace

int launch_lora_merge(const MergeItem* table, int32_t count, int64_t tiles, MergeTypes types,
                      Rounding rounding, Noise noise, int device, void* stream) {
  const DeviceGuard guard(device);
  if (const int error = guard.error()) return error;
  kernel_for(
      types,
      rounding)<<<static_cast<unsigned>(tiles), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      table, count, types.adapter, noise);
  return cudaGetLastError();
}

}  // namespace fused_lora
