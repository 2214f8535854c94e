#include <cuda.h>
#include <cuda_runtime_api.h>

#include "common/tensor_map.h"

namespace fused_lora::sm90 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Asked of the driver when first needed: the module is not linked against one.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  const bool there = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return there ? reinterpret_cast<Encode>(function) : nullptr;
}

}  // namespace

int encode(const MapShape& shape, TensorMap* map) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  static_assert(alignof(TensorMap) >= alignof(CUtensorMap));
  static const Encode driver = find_encode();
  if (!driver) return cudaErrorNotSupported;
  // Of each dimension, columns first.
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(shape.columns),
                              static_cast<cuuint64_t>(shape.rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(shape.row) * 2};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(shape.box_rows)};
  const cuuint32_t every[] = {1, 1};
  const CUresult result =
      driver(reinterpret_cast<CUtensorMap*>(map),
             shape.type == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             2, const_cast<void*>(shape.at), sizes, row_bytes, box, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace fused_lora::sm90
