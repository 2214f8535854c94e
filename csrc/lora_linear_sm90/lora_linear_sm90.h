// EXTENDED on sm_90: base and low-rank products in one fp32 accumulator. The shapes of the
// operation.
//
//   z = x right + sum over groups of h_g border_g + bias     y = residual + factor end(z)
//
//   rows     w [N, K], border_g [N_g, R_g]   y = act(x wT + bias + s h bT), border = s b
//   columns  w [K, N], border_g [R_g, N_g]   dx = dy w + dh a,              border = a
//
// Where there is an activation, end is act by rows, and z is written as u; by columns it is
// act'(u) z, u the given one of x = act(u). Group g adds to the columns it owns, any range of them.
// All matrices are of one 16-bit type, their rows begin at multiples of 16 bytes. y, and a u that
// is written, are rounded once.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/dtype.h"

namespace fused_lora::sm90 {

constexpr int kMostLinearGroups = 4;

enum class Right : int32_t { kRows = 0, kColumns = 1 };  // how w and the borders lie

struct Matrix {
  const void* at;
  int64_t row;  // elements from one row to the next
};

struct LinearGroup {
  Matrix h;       // [M, R_g]
  Matrix border;  // [N_g, R_g] or [R_g, N_g]
  int32_t first_column, columns, rank;
  int32_t reserved;
};

struct LinearShape {
  int64_t rows;     // M
  int32_t columns;  // N, a multiple of 8
  int32_t depth;    // K, a multiple of 8
  int32_t ranks;    // of all groups
  Right right;
  Activation activation;
};

struct LinearProblem {
  Matrix x, w, y;
  Matrix u;            // [M, N], written by rows and read by columns; null without an activation
  Matrix residual;     // [M, N] or null
  const void* bias;    // [N], contiguous, or null
  const void* factor;  // likewise
  LinearGroup group[kMostLinearGroups];
  int32_t groups;
  DType type;
};

// A launch: blocks of three warpgroups walk over the tiles of y, by themselves or in clusters.
// Where rows make no whole number of clusters, the last tiles have none.
struct LinearPlan {
  LinearShape shape;
  int32_t tile_rows, tile_columns, cluster;
  bool ping_pong;
  int32_t stages, smem_bytes;
  int32_t blocks;
  int64_t tiles;
};

// The tile with the shortest estimate on so many processors; clusters and consumers in ping-pong
// wait for a GPU to time them.
LinearPlan plan_lora_linear(LinearShape shape, int processors);

// The same in a given tile, whose cluster is one block where a tile has all rows; nothing where it
// is not compiled.
std::optional<LinearPlan> plan_lora_linear(LinearShape shape, int processors, int tile_rows,
                                           int tile_columns, int cluster, bool ping_pong);

// Throws std::invalid_argument where the operands are not as the kernel needs them.
void lora_linear(const LinearProblem& problem, const LinearPlan& plan, int device, void* stream);

// The launch alone, in lora_linear_sm90.cu. Returns a cudaError_t.
int launch_lora_linear(const LinearProblem& problem, const LinearPlan& plan, int device,
                       void* stream);

}  // namespace fused_lora::sm90
