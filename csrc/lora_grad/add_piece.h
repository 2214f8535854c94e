// A block of add_partials: 32 neighbouring elements of a partial. Warp w adds slices w, w + 8, ...
// and the first warp adds the warps.
#pragma once

#include "common/warp.h"
#include "lora_grad/add_partials.h"
#include "lora_grad/fragments.h"

namespace fused_lora {

struct GradTarget {
  void* base;
  int64_t index;
  float scale;
  DType type;
  bool add;
};

// Where the element of [columns of x | dy, R] goes; a null base if nowhere.
FL_DEVICE GradTarget target_of(const SumPiece& piece, int column, int r) {
  const int n = column - piece.x_columns();
  if (n >= 0 && r == piece.ranks) {
    const bool inside = n < piece.n;
    return {inside ? piece.dbias : nullptr, n, 1.0f, piece.dbias_type, false};
  }
  const int g = group_of(piece, r);
  if (g == piece.groups) return {};
  const SumGroup& group = piece.group[g];
  const int64_t rank = r - group.first_rank, row = n - group.first_column;
  if (n < 0) {
    void* base = column < piece.k ? group.da : nullptr;
    return {base, rank * group.da_r + column * group.da_k, 1.0f, piece.grad, piece.add};
  }
  void* base = row >= 0 && row < group.columns ? group.db : nullptr;
  return {base, row * group.db_n + rank * group.db_r, group.scale, piece.grad, piece.add};
}

template <typename T>
FL_DEVICE void put_as(const GradTarget& target, float value) {
  T* at = static_cast<T*>(target.base) + target.index;
  *at = nearest<T>(target.add ? widen(*at) + value : value);
}

FL_DEVICE void put(const GradTarget& target, float value) {
  switch (target.type) {
    case DType::kFloat32: return put_as<float>(target, value);
    case DType::kBFloat16: return put_as<BFloat16>(target, value);
    case DType::kFloat16: return put_as<Float16>(target, value);
  }
}

FL_DEVICE void add_piece(const SumPiece& piece, float (&sums)[kGradWarps][32], int block) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int ranks = 16 * piece.rank_blocks, e = block * kSumElements + lane;
  const int64_t size = piece.elements();
  const GradTarget target = target_of(piece, e / ranks, e % ranks);
  float sum = 0.0f;
  if (target.base) {
    for (int slice = warp; slice < piece.slices; slice += kGradWarps) {
      sum += piece.partial[slice * size + e];
    }
  }
  sums[warp][lane] = sum;
  sync_block();
  if (warp > 0 || !target.base) return;
  for (int w = 1; w < kGradWarps; ++w) sum += sums[w][lane];
  put(target, target.scale * sum);
}

FL_DEVICE void add_pieces(const Sums& given, float (&sums)[kGradWarps][32], int block) {
  int p = 0;
  while (p + 1 < given.pieces && block >= given.first_block[p + 1]) ++p;
  add_piece(given.piece[p], sums, block - given.first_block[p]);
}

}  // namespace fused_lora
