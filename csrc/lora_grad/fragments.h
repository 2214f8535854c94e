// a and b as the shrink multiplies with them: one instruction deep in columns, which is 16 of bf16
// or fp16 and 8 of TF32, and 16 ranks wide; zero where no adapter has both.
#pragma once

#include "common/activation.h"
#include "lora_grad/layout.h"

namespace fused_lora {

// The adapter that has this stacked rank; groups if none.
template <typename Grouped>
FL_DEVICE int group_of(const Grouped& of, int r) {
  int g = 0;
  while (g < of.groups &&
         (r < of.group[g].first_rank || r >= of.group[g].first_rank + of.group[g].rank)) {
    ++g;
  }
  return g;
}

FL_DEVICE float element(const void* base, int64_t index, DType type) {
  if (type == DType::kFloat32) return static_cast<const float*>(base)[index];
  const uint16_t bits = static_cast<const uint16_t*>(base)[index];
  return type == DType::kBFloat16 ? widen(BFloat16{bits}) : widen(Float16{bits});
}

// Four neighbours of a vector that nobody writes, from a multiple of four on; without it four of
// what it `lacks`.
FL_DEVICE Four four_of(const void* base, int index, DType type, float lacks) {
  Four found = {{lacks, lacks, lacks, lacks}};
  if (!base) return found;
#ifdef __CUDACC__
  if (type == DType::kFloat32) {
    const float4 four = __ldg(static_cast<const float4*>(base) + index / 4);
    return {{four.x, four.y, four.z, four.w}};
  }
  const uint2 four = __ldg(static_cast<const uint2*>(base) + index / 4);
  const uint32_t words[2] = {four.x, four.y};
  FL_UNROLL
  for (int i = 0; i < 4; i += 2) {
    const Pair pair =
        type == DType::kBFloat16 ? pair_of<BFloat16>(words, i) : pair_of<Float16>(words, i);
    found.at[i] = pair.at[0], found.at[i + 1] = pair.at[1];
  }
#else
  for (int i = 0; i < 4; ++i) found.at[i] = element(base, index + i, type);
#endif
  return found;
}

// One rank of a over the columns of x, or of b over those of dy that its adapter owns.
struct Line {
  const void* at;
  int64_t first, step;  // elements
  int32_t begin, end;   // columns
};

FL_DEVICE Line line_of(const GradProblem& problem, bool is_dy, int r) {
  const int g = group_of(problem, r);
  if (g == problem.groups) return {};
  const GradGroup& group = problem.group[g];
  const int64_t rank = r - group.first_rank;
  if (!is_dy) return {group.a, rank * group.a_r, group.a_k, 0, problem.x.columns};
  const int32_t begin = group.first_column;
  return {group.b, rank * group.b_r, group.b_n, begin, begin + group.columns};
}

FL_DEVICE float on(const Line& line, int column, DType type) {
  if (column < line.begin || column >= line.end) return 0.0f;
  return element(line.at, line.first + (column - line.begin) * line.step, type);
}

template <typename T>
FL_DEVICE uint32_t pack(float low, float high) {
  return nearest<T>(low).bits | static_cast<uint32_t>(nearest<T>(high).bits) << 16;
}

struct alignas(16) Fragment {
  uint32_t at[4];
};

// Neighbouring columns share a word.
template <typename T>
FL_DEVICE Fragment fragment_of_pairs(const GradProblem& problem, const Line (&lines)[2], int column,
                                     int lane) {
  float value[8];
  FL_UNROLL
  for (int i = 0; i < 8; ++i) {
    const int c = column + 2 * (lane % 4) + i % 2 + (i & 2) * 4;
    value[i] = on(lines[i / 4], c, problem.adapter);
  }
  Fragment fragment;
  FL_UNROLL
  for (int i = 0; i < 4; ++i) fragment.at[i] = pack<T>(value[2 * i], value[2 * i + 1]);
  return fragment;
}

// This lane's part of the block of columns and ranks that start here.
template <typename T>
FL_DEVICE Fragment fragment_of(const GradProblem& problem, bool is_dy, int column, int r,
                               int lane) {
  const Line lines[2] = {line_of(problem, is_dy, r + lane / 4),
                         line_of(problem, is_dy, r + lane / 4 + 8)};
  if constexpr (sizeof(T) == 4) {
    Fragment fragment;
    FL_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int c = column + lane % 4 + i / 2 * 4;
      fragment.at[i] = nearest<T>(on(lines[i % 2], c, problem.adapter)).bits;
    }
    return fragment;
  } else {
    return fragment_of_pairs<T>(problem, lines, column, lane);
  }
}
}  // namespace fused_lora
