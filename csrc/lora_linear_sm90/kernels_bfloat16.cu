#include "lora_linear_sm90/kernels.h"

namespace fused_lora::sm90 {

template const void* kernel_of<BFloat16>(const LinearPlan& plan);

}  // namespace fused_lora::sm90
