// The second launch of lora_grad: slices of fp32 partial sums added in a fixed order, for up to six
// passes at once. Each sum is scaled, rounded once and put where its adapter's gradient lies.
//
//   da_g[r, c] = sum over slices of partial[slice, c, first_rank_g + r]          columns of x
//   db_g[n, r] = s_g times likewise, of column 16 ceil(k / 16) + first_column_g + n      of dy
//   dbias[n]   = likewise of rank R, which no adapter has; unscaled
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "lora_grad/lora_grad.h"

namespace fused_lora {

constexpr int kMostPieces = 6;
constexpr int kSumColumns = 16;   // columns of x, and of dy, are whole multiples of it
constexpr int kSumElements = 32;  // of a partial, that a block adds up

// Where one adapter's gradients go. Strides count elements, any are served.
struct SumGroup {
  void* da;  // [R_g, K]; null where nobody asks
  void* db;  // [N_g, R_g]
  int64_t da_r, da_k, db_n, db_r;
  int32_t first_column, columns;  // of dy
  int32_t first_rank, rank;       // of the stacked h
  float scale;
  int32_t reserved;
};

// What one pass left, and what becomes of it.
struct SumPiece {
  const float* partial;  // [slices, all_columns(), 16 rank_blocks]
  void* dbias;           // [N], contiguous; null where nobody asks
  SumGroup group[kMostGroups];
  int32_t slices;
  int32_t k, n;         // columns of x and of dy that it has; 0 if none
  int32_t rank_blocks;  // of 16
  int32_t ranks, groups;
  DType grad, dbias_type;
  bool add;  // to what da and db hold

  constexpr int32_t x_columns() const { return (k + kSumColumns - 1) / kSumColumns * kSumColumns; }
  constexpr int32_t dy_columns() const { return (n + kSumColumns - 1) / kSumColumns * kSumColumns; }
  constexpr int64_t elements() const {
    return (static_cast<int64_t>(x_columns()) + dy_columns()) * 16 * rank_blocks;
  }
};

// A launch: piece p has the blocks from first_block[p] on.
struct Sums {
  SumPiece piece[kMostPieces];
  int32_t first_block[kMostPieces + 1];
  int32_t pieces;
};
static_assert(sizeof(Sums) <= 4096, "what a kernel is given may have 4,096 bytes");

// Fills in first_block.
void add_partials(Sums sums, int device, void* stream);

// The launch alone, in add_partials.cu. Returns a cudaError_t.
int launch_add_partials(const Sums& sums, int device, void* stream);

}  // namespace fused_lora
