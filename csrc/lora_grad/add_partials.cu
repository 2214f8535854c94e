#include <cuda_runtime_api.h>

#include "common/device_guard.h"
#include "lora_grad/add_piece.h"

namespace fused_lora {
namespace {

__global__ void __launch_bounds__(kGradThreads)
    add_partials_kernel(const __grid_constant__ Sums given) {
  __shared__ float sums[kGradWarps][32];
  add_pieces(given, sums, blockIdx.x);
}

}  // namespace

int launch_add_partials(const Sums& sums, int device, void* stream) {
  const DeviceGuard guard(device);
  if (const int error = guard.error()) return error;
  void* pointers[] = {const_cast<Sums*>(&sums)};
  const dim3 grid(sums.first_block[sums.pieces]), block(kGradThreads);
  return cudaLaunchKernel(reinterpret_cast<const void*>(add_partials_kernel), grid, block, pointers,
                          0, static_cast<cudaStream_t>(stream));
}

}  // namespace fused_lora
