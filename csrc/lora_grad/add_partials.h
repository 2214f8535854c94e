// The second kernel of lora_grad: slices added in a fixed order, each sum scaled, rounded once and
// put where its adapter's gradient lies. 32 neighbouring elements of a partial per block; warp w
// adds slices w, w + 8, ... and the first warp adds the warps.
#pragma once

#include "common/warp.h"
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
FL_DEVICE GradTarget target_of(const GradProblem& problem, const GradPlan& plan, int column,
                               int r) {
  const int n = column - 16 * plan.x_strips;
  if (n >= 0 && r == problem.ranks) {
    const bool inside = n < problem.dy.columns;
    return {inside ? problem.dbias : nullptr, n, 1.0f, problem.dbias_type, false};
  }
  const int g = group_of(problem, r);
  if (g == problem.groups) return {};
  const GradGroup& group = problem.group[g];
  const int64_t rank = r - group.first_rank, row = n - group.first_column;
  if (n < 0) {
    void* base = column < problem.x.columns ? group.da : nullptr;
    return {base, rank * group.da_r + column * group.da_k, 1.0f, problem.grad, problem.add};
  }
  void* base = row >= 0 && row < group.columns ? group.db : nullptr;
  return {base, row * group.db_n + rank * group.db_r, group.scale, problem.grad, problem.add};
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

FL_DEVICE void add_partials(const GradProblem& problem, const GradPlan& plan, const float* partial,
                            float (&sums)[kGradWarps][32], int block) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int ranks = 16 * plan.rank_blocks, size = plan.columns() * ranks, e = block * 32 + lane;
  const GradTarget target = target_of(problem, plan, e / ranks, e % ranks);
  float sum = 0.0f;
  if (target.base) {
    for (int slice = warp; slice < plan.slices; slice += kGradWarps) {
      sum += partial[static_cast<int64_t>(slice) * size + e];
    }
  }
  sums[warp][lane] = sum;
  sync_block();
  if (warp > 0 || !target.base) return;
  for (int w = 1; w < kGradWarps; ++w) sum += sums[w][lane];
  put(target, target.scale * sum);
}

}  // namespace fused_lora
