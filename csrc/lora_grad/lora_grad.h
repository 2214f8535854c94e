// RANK gradients of all groups from one read of x and dy, as sums of slices of rows, or of clusters
// of slices, which add_partials.h adds up. The shapes of the operation.
//
//   h  = x aT     dh_g = s_g dy[:, g] b_g      formed on chip, or given
//   db_g = s_g dy[:, g]T h_g                   da = dhT x      dbias = sum over rows of dy
//
// x may be GELU(u) of a u that is given in its place, or the LayerNorm of its input.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/dtype.h"

namespace fused_lora {

constexpr int kMostGroups = 4;
constexpr int kMostRanks = 64;  // stacked, and one more where dbias is asked for

// One adapter: where its operands lie. Strides count elements, any are served.
struct GradGroup {
  const void* a;  // [R_g, K]; null where dh and h are given
  const void* b;  // [N_g, R_g]
  int64_t a_r, a_k, b_n, b_r;
  int32_t first_column, columns;  // of dy
  int32_t first_rank, rank;       // of the stacked h
  float scale;
  int32_t reserved;
};

// x and what it makes, h; or dy and what it makes, dh.
struct GradSide {
  const void* z;      // [M, columns], rows contiguous, each at a multiple of 16 bytes
  const void* given;  // [M, R], rows contiguous; null where it is to be formed from z
  int64_t row;        // from one row of z to the next
  int64_t given_row;
  int32_t columns;  // of whole 16 bytes
  int32_t reserved;
};

// x = (z - mean) rstd gamma + beta of the z that is given in its place.
struct GradNorm {
  const float *mean, *rstd;  // [M]; null where x is no LayerNorm
  const void *gamma, *beta;  // [K], each at a multiple of 16 bytes; null for ones, and for zeros
  DType type;                // of both
};

struct GradProblem {
  GradSide x, dy;
  GradGroup group[kMostGroups];
  void* dh;  // [M, R], rows contiguous: where dh goes as it is formed; null where nobody asks
  int64_t dh_row;
  int64_t rows;
  int32_t groups, ranks;
  DType type;             // of x, dy, h and dh; products of fp32 are of TF32
  DType adapter;          // of a and b
  Activation activation;  // x is that of what is given in its place; of 16 bits
  GradNorm norm;          // likewise; not both
};

// What decides whether, and how, one problem is computed.
struct GradShape {
  int32_t k, n, ranks;
  bool h_given, dh_given, needs_a, needs_b, needs_bias;
  bool tf32;       // x, dy, h and dh are fp32; else of 16 bits
  bool writes_dh;  // which is then formed whether or not da is asked for

  constexpr int32_t bytes() const { return tf32 ? 4 : 2; }  // of an element
  constexpr int32_t all_ranks() const { return ranks + needs_bias; }
  constexpr bool forms_h() const { return needs_b && !h_given; }
  constexpr bool forms_dh() const { return (needs_a || writes_dh) && !dh_given; }
  constexpr bool forms() const { return forms_h() || forms_dh(); }
  constexpr bool reads_x() const { return needs_a || forms_h(); }
  constexpr bool reads_dy() const { return needs_b || needs_bias || forms_dh(); }
};

// Of a tile: as many as a matrix instruction is deep.
constexpr int32_t tile_rows(bool tf32) { return tf32 ? 8 : 16; }

// A launch. Columns of x and dy are cut into strips of 16, strips are dealt to warps.
struct GradPlan {
  GradShape shape;
  int32_t most_strips;      // per warp, what the kernel is compiled for
  int32_t rank_blocks;      // of 16
  int32_t strips_per_warp;  // what is dealt
  int32_t x_strips, dy_strips;
  int32_t x_warps;  // over all chunks; dy's warps follow
  int32_t chunks;   // of 8 warps; where h or dh is formed, a cluster of as many blocks
  int32_t stages;   // tiles of rows under way
  int32_t blocks;   // that share a processor
  int32_t smem_bytes;
  int32_t slices;          // of the rows: a slice of a chunk is a block
  int32_t cluster_slices;  // neighbours that add up their sums before they are written; 1 if none

  // Whether the chunks of a slice are a cluster, or a part of one.
  constexpr bool in_clusters() const { return shape.forms() && chunks > 1; }
  constexpr int32_t cluster_chunks() const { return in_clusters() ? chunks : 1; }
  constexpr int32_t partials() const { return slices / cluster_slices; }
  // Whether some warp holds as much as its kernel can.
  constexpr bool full() const { return strips_per_warp == most_strips; }
  constexpr int32_t columns() const { return 16 * (x_strips + dy_strips); }
  constexpr int64_t partial_floats() const {
    return static_cast<int64_t>(partials()) * columns() * 16 * rank_blocks;
  }
};

// Clusters of four blocks, and of eight, that a chip runs at once where a block has a processor to
// itself; -1 where nobody has asked the chip.
struct ClusterCounts {
  int32_t fours = -1, eights = -1;
};

// What the device says; -1 where it does not. In lora_grad.cu.
ClusterCounts clusters_at_once(int device);

// Nothing where no block or cluster of this architecture (80, 86, 89, 90, ...) holds the problem.
std::optional<GradPlan> plan_lora_grad(GradShape shape, int64_t rows, int arch, int processors,
                                       ClusterCounts counts = {});

// `partial` [partials(), columns(), 16 rank_blocks] is written where its gradients are asked for.
void lora_grad(const GradProblem& problem, const GradPlan& plan, float* partial, int device,
               void* stream);

// The launch alone, in lora_grad.cu. Returns a cudaError_t.
int launch_lora_grad(const GradProblem& problem, const GradPlan& plan, float* partial, int device,
                     void* stream);

}  // namespace fused_lora
