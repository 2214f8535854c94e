// What the kernel is told: matrices as the copy engine reads them, and little else.
#pragma once

#include "common/tensor_map.h"
#include "lora_linear_sm90/layout.h"

namespace fused_lora::sm90 {

struct LinearSpan {
  int32_t first_column, columns, rank;
};

struct LinearEpilogue {
  const void* bias;
  const void* factor;
  const void* residual;
  const void* u;  // of a derivative
  int64_t residual_row, u_row;
};

struct LinearArguments {
  TensorMap x, w, y, u;
  TensorMap h[kMostLinearGroups], border[kMostLinearGroups];
  LinearSpan span[kMostLinearGroups];
  LinearEpilogue epilogue;
  int64_t tiles;  // of each block of a cluster
  int64_t rows;
  int32_t columns, depth, groups;
};

// The shape of w, or of a border, `columns` of y by `depth`; a box is a block's share of a stage.
inline MapShape right_shape(const LinearProblem& problem, const LinearPlan& plan,
                            const Matrix& matrix, int32_t columns, int32_t depth) {
  if (plan.shape.right == Right::kRows) {
    return {matrix.at, problem.type, columns, depth, matrix.row, plan.tile_columns / plan.cluster};
  }
  return {matrix.at, problem.type, depth, columns, matrix.row, kDepth / plan.cluster};
}

// Returns a cudaError_t.
inline int make_arguments(const LinearProblem& problem, const LinearPlan& plan,
                          LinearArguments* arguments) {
  const LinearShape& shape = plan.shape;
  const auto left = [&](const Matrix& matrix, int32_t columns, int box_rows) {
    return MapShape{matrix.at, problem.type, shape.rows, columns, matrix.row, box_rows};
  };
  int error = encode(left(problem.x, shape.depth, plan.tile_rows), &arguments->x);
  if (!error) {
    error =
        encode(right_shape(problem, plan, problem.w, shape.columns, shape.depth), &arguments->w);
  }
  if (!error) error = encode(left(problem.y, shape.columns, kConsumerRows), &arguments->y);
  if (!error && problem.u.at && shape.right == Right::kRows) {
    error = encode(left(problem.u, shape.columns, kConsumerRows), &arguments->u);
  }
  arguments->groups = 0;
  for (int g = 0; g < problem.groups && !error; ++g) {
    const LinearGroup& group = problem.group[g];
    if (group.rank == 0 || group.columns == 0) continue;
    const int at = arguments->groups++;
    arguments->span[at] = {group.first_column, group.columns, group.rank};
    error = encode(left(group.h, group.rank, plan.tile_rows), &arguments->h[at]);
    if (error) break;
    error = encode(right_shape(problem, plan, group.border, group.columns, group.rank),
                   &arguments->border[at]);
  }
  arguments->epilogue = {problem.bias, problem.factor,       problem.residual.at,
                         problem.u.at, problem.residual.row, problem.u.row};
  arguments->tiles = plan.tiles / plan.cluster, arguments->rows = shape.rows;
  arguments->columns = shape.columns, arguments->depth = shape.depth;
  return error;
}

}  // namespace fused_lora::sm90
