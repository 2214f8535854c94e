#include <cuda_runtime_api.h>

#include "common/error.h"

namespace fused_lora {

const char* cuda_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace fused_lora
