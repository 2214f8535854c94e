// w' = w + s b a for any number of layers in one launch. The shapes of the operation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/philox.h"

namespace fused_lora {

enum class Rounding : int32_t { kNearest = 0, kStochastic = 1 };

// One adapter on one matrix or block of rows of it. Strides count elements.
struct MergeItem {
  const void* w;       // [n, k], last dimension contiguous
  void* out;           // [n, k], last dimension contiguous; w itself, or disjoint from it
  const void* a;       // [r, k]
  const void* b;       // [n, r]
  int64_t w_row;       // from one row of w to the next
  int64_t out_row;     //
  int64_t a_r, a_k;    // any strides: a may be a block of a larger tensor
  int64_t b_n, b_r;    //
  int64_t offset;      // random index of element (0, 0); (i, j) has offset + i k + j
  int64_t first_tile;  // set by pack_merge_items: tiles of all items before this one
  int32_t n, k, r;
  float scale;
  int32_t vectorised;  // set by pack_merge_items: groups of eight may be moved 16 bytes at a time
  int32_t reserved;
};

struct MergeTypes {
  DType w, out, adapter;
};

struct PackedMerge {
  std::string table;  // the items as they lie in device memory
  int64_t tiles;      // blocks to launch
};

// Checks the items and fills in what is derived.
PackedMerge pack_merge_items(std::vector<MergeItem> items, MergeTypes types);

// `table` is a device pointer to what pack_merge_items made of `count` items.
void lora_merge(const void* table, int32_t count, int64_t tiles, MergeTypes types,
                Rounding rounding, Noise noise, int device, void* stream);

// The launch alone, in lora_merge.cu. Returns a cudaError_t.
int launch_lora_merge(const MergeItem* table, int32_t count, int64_t tiles, MergeTypes types,
                      Rounding rounding, Noise noise, int device, void* stream);

}  // namespace fused_lora
