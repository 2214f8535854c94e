// What CUDA says of its error codes.
#pragma once

namespace fused_lora {

const char* cuda_error_text(int error);

}  // namespace fused_lora
