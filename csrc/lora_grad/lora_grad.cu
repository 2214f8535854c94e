#include <cuda_runtime_api.h>

#include "common/device_guard.h"
#include "lora_grad/one_pass.h"

namespace fused_lora {
namespace {

struct Arguments {
  GradProblem problem;
  GradPlan plan;
  float* partial;
};

template <typename T,  // of products
          int S,       // strips of 16 columns a warp owns at most
          int RB,      // blocks of 16 ranks
          bool forms   // h or dh
          >
__global__ void __launch_bounds__(kGradThreads, GradLayout<T, S, RB, forms>::kBlocks)
    lora_grad_kernel(const __grid_constant__ Arguments arguments) {
  extern __shared__ char shared[];
#ifdef __CUDA_ARCH__
  // Where a block's tiles cannot be held, the plan never launches it.
  if constexpr (GradLayout<T, S, RB, forms>::bytes(kLeastStages) <=
                smem_limit_bytes(__CUDA_ARCH__ / 10)) {
    const int slice = blockIdx.x, chunk = blockIdx.y;
    OnePass<T, S, RB, forms, FL_BULK_COPIES>(arguments.problem, arguments.plan, shared, slice,
                                             chunk)
        .run(arguments.partial);
  }
#endif
}

using Kernel = void (*)(Arguments);

// The kernel of a plan's shape.
struct Find {
  const Arguments* arguments;
  Kernel* kernel;

  template <typename T, int S, int RB, bool forms>
  void operator()() const {
    const GradPlan& plan = arguments->plan;
    if (plan.most_strips != S || plan.rank_blocks != RB || plan.shape.forms() != forms) return;
    *kernel = lora_grad_kernel<T, S, RB, forms>;
  }
};

cudaError_t launch(Kernel kernel, dim3 grid, dim3 cluster, int smem_bytes,
                   const Arguments& arguments, void* stream) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (smem_bytes > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
    if (error) return error;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster.x, cluster.y, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(kGradThreads);
  config.dynamicSmemBytes = smem_bytes, config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = cluster.x * cluster.y > 1 ? 1 : 0;
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  return cudaLaunchKernelExC(&config, function, pointers);
}

// How many clusters of so many blocks run at once, each block with all the shared memory there is.
int clusters_of(int blocks, int smem_bytes) {
  const void* function = reinterpret_cast<const void*>(lora_grad_kernel<BFloat16, 6, 1, true>);
  if (cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes)) {
    return -1;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks), config.blockDim = dim3(kGradThreads);
  config.dynamicSmemBytes = smem_bytes;
  config.attrs = &attribute, config.numAttrs = 1;
  int found = 0;
  return cudaOccupancyMaxActiveClusters(&found, function, &config) ? -1 : found;
}

}  // namespace

ClusterCounts clusters_at_once(int device) {
  const DeviceGuard guard(device);
  int smem_bytes = 0;
  if (guard.error() ||
      cudaDeviceGetAttribute(&smem_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
    return {};
  }
  return {clusters_of(4, smem_bytes), clusters_of(8, smem_bytes)};
}

int launch_lora_grad(const GradProblem& problem, const GradPlan& plan, float* partial, int device,
                     void* stream) {
  const DeviceGuard guard(device);
  if (const int error = guard.error()) return error;
  const Arguments arguments = {problem, plan, partial};
  Kernel kernel = nullptr;
  each_grad_shape(problem.type, Find{&arguments, &kernel});
  const dim3 grid(plan.slices, plan.chunks);
  const dim3 cluster(plan.cluster_slices, plan.cluster_chunks());
  return launch(kernel, grid, cluster, plan.smem_bytes, arguments, stream);
}

}  // namespace fused_lora
