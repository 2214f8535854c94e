// a and b as the shrink multiplies with them: [16 columns, 16 ranks] per strip and rank block, zero
// where no adapter has both.
#pragma once

#include "lora_grad/layout.h"

namespace fused_lora {

// The adapter that has this stacked rank; groups if none.
FL_DEVICE int group_of(const GradProblem& problem, int r) {
  int g = 0;
  while (g < problem.groups && (r < problem.group[g].first_rank ||
                                r >= problem.group[g].first_rank + problem.group[g].rank)) {
    ++g;
  }
  return g;
}

FL_DEVICE float element(const void* base, int64_t index, DType type) {
  if (type == DType::kFloat32) return static_cast<const float*>(base)[index];
  const uint16_t bits = static_cast<const uint16_t*>(base)[index];
  return type == DType::kBFloat16 ? widen(BFloat16{bits}) : widen(Float16{bits});
}

// a[r, column] of the stacked a, or b[column, r] of the b beside and below each other.
FL_DEVICE float border(const GradProblem& problem, bool is_dy, int column, int r) {
  const int g = group_of(problem, r);
  if (g == problem.groups) return 0.0f;
  const GradGroup& group = problem.group[g];
  const int64_t rank = r - group.first_rank;
  if (!is_dy) return element(group.a, rank * group.a_r + column * group.a_k, problem.adapter);
  const int64_t n = column - group.first_column;
  if (n < 0 || n >= group.columns) return 0.0f;
  return element(group.b, n * group.b_n + rank * group.b_r, problem.adapter);
}

template <typename T>
FL_DEVICE uint32_t pack(float low, float high) {
  return nearest<T>(low).bits | static_cast<uint32_t>(nearest<T>(high).bits) << 16;
}

struct alignas(16) Fragment {
  uint32_t at[4];
};

// This lane's part of the block of columns and ranks that start here.
template <typename T>
FL_DEVICE Fragment fragment_of(const GradProblem& problem, bool is_dy, int column, int r, int end,
                               int lane) {
  float value[8];
  FL_UNROLL
  for (int i = 0; i < 8; ++i) {
    const int c = column + 2 * (lane % 4) + i % 2 + (i & 2) * 4;
    value[i] = c < end ? border(problem, is_dy, c, r + lane / 4 + (i & 4) * 2) : 0.0f;
  }
  Fragment fragment;
  FL_UNROLL
  for (int i = 0; i < 4; ++i) fragment.at[i] = pack<T>(value[2 * i], value[2 * i + 1]);
  return fragment;
}

}  // namespace fused_lora
