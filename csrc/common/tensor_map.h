// A matrix in device memory, as the copy engine of sm_90 is told of it: boxes of it travel to and
// from shared memory in rows of 128 bytes, whose 16-byte pieces are swizzled (see swizzled()).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fused_lora::sm90 {

// What the driver makes of a MapShape; opaque.
struct alignas(128) TensorMap {
  unsigned char bytes[128];
};

struct MapShape {
  const void* at;         // 16-byte aligned
  DType type;             // of 16 bits
  int64_t rows, columns;  // at least one of each
  int64_t row;            // elements from one row to the next, a multiple of 8
  int32_t box_rows;       // at most 256
};

constexpr int kBoxColumns = 64;  // 128 bytes, as far as a swizzle reaches
constexpr int kBoxRowBytes = 2 * kBoxColumns;

// Where the 16 bytes of a box lie that would, row after row, lie at this shared address. Eight rows
// repeat, so that eight pieces of one column are in different banks.
constexpr uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// Returns a cudaError_t.
int encode(const MapShape& shape, TensorMap* map);

}  // namespace fused_lora::sm90
