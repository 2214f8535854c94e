#include "lora_linear_sm90/lora_linear_sm90.h"

#include <algorithm>
#include <stdexcept>

#include "common/error.h"
#include "lora_linear_sm90/layout.h"

namespace fused_lora::sm90 {
namespace {

// Cycles that one stage of a tile takes, for products or for what it reads, and those of its
// epilogue. Guesses until a GPU has run it: products of 2,048 elements and 64 bytes a cycle.
int64_t tile_cycles(int rows, int columns, int64_t stages) {
  const int64_t products = static_cast<int64_t>(rows) * columns * kDepth / 2048;
  const int64_t reads = static_cast<int64_t>(rows + columns) * kBoxRowBytes / 64;
  return stages * std::max(products, reads) + 600 + rows * columns / 32;
}

int64_t cycles(const LinearPlan& plan) {
  const int64_t stages = ceil_div(plan.shape.depth, kDepth) + ceil_div(plan.shape.ranks, kDepth);
  return ceil_div(plan.tiles, plan.blocks) * tile_cycles(plan.tile_rows, plan.tile_columns, stages);
}

template <typename Tile>
LinearPlan plan_in(const LinearShape& shape, int processors) {
  constexpr int kCluster = Tile::kCluster;
  const int64_t tiles =
      ceil_div(shape.rows, kCluster * Tile::kRows) *  // of each block of a cluster
      ceil_div(shape.columns, Tile::kColumns);
  const int64_t clusters = std::max<int64_t>(1, std::min<int64_t>(tiles, processors / kCluster));
  const int32_t blocks = static_cast<int32_t>(kCluster * clusters);
  return {shape,         Tile::kRows,  Tile::kColumns, kCluster,        Tile::kPingPong,
          Tile::kStages, Tile::kBytes, blocks,         kCluster * tiles};
}

struct Shortest {
  const LinearShape& shape;
  int processors;
  LinearPlan* best;

  template <typename Tile>
  void operator()() const {
    if (Tile::kCluster > 1 || Tile::kPingPong) return;
    const LinearPlan plan = plan_in<Tile>(shape, processors);
    if (best->blocks == 0 || cycles(plan) < cycles(*best)) *best = plan;
  }
};

struct Named {
  const LinearShape& shape;
  int processors, tile_rows, tile_columns, cluster;
  bool ping_pong;
  std::optional<LinearPlan>* found;

  template <typename Tile>
  void operator()() const {
    if (Tile::kRows != tile_rows || Tile::kColumns != tile_columns) return;
    if (Tile::kCluster != cluster || Tile::kPingPong != ping_pong) return;
    *found = plan_in<Tile>(shape, processors);
  }
};

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument("lora_linear: " + what);
}

void check_matrix(const Matrix& matrix, const std::string& name) {
  require(matrix.at && reinterpret_cast<uintptr_t>(matrix.at) % 16 == 0 && matrix.row % 8 == 0 &&
              matrix.row > 0,
          name + " must begin, and each of its rows, at a multiple of 16 bytes");
}

void check_vector(const void* vector, const std::string& name) {
  require(reinterpret_cast<uintptr_t>(vector) % 4 == 0,
          name + " must begin at a multiple of 4 bytes");
}

void check_groups(const LinearProblem& problem, const LinearShape& shape) {
  require(problem.groups >= 0 && problem.groups <= kMostLinearGroups,
          "serves up to " + std::to_string(kMostLinearGroups) + " groups, got " +
              std::to_string(problem.groups));
  for (int g = 0; g < problem.groups; ++g) {
    const LinearGroup& group = problem.group[g];
    const std::string name = "group " + std::to_string(g);
    require(group.first_column >= 0 && group.columns >= 0 && group.rank >= 0 &&
                group.first_column + group.columns <= shape.columns,
            name + " has columns or ranks out of place");
    if (group.rank == 0 || group.columns == 0) continue;
    check_matrix(group.h, "h of " + name);
    check_matrix(group.border, "the border of " + name);
  }
}

void check(const LinearProblem& problem, const LinearPlan& plan) {
  const LinearShape& shape = plan.shape;
  require(problem.type != DType::kFloat32, "serves bfloat16 and float16");
  require(shape.depth > 0 && shape.depth % 8 == 0 && shape.columns % 8 == 0,
          "the depth and the columns must be multiples of 8, got " + std::to_string(shape.depth) +
              " and " + std::to_string(shape.columns));
  require(shape.rows < (int64_t{1} << 31) - 256, "too many rows: " + std::to_string(shape.rows));
  check_matrix(problem.x, "x"), check_matrix(problem.w, "w"), check_matrix(problem.y, "y");
  require((shape.activation != Activation::kNone) == (problem.u.at != nullptr),
          "u belongs to an activation, and to nothing else");
  if (problem.u.at) check_matrix(problem.u, "u");
  if (problem.residual.at) check_matrix(problem.residual, "the residual");
  check_vector(problem.bias, "bias"), check_vector(problem.factor, "the factor");
  check_groups(problem, shape);
}

}  // namespace

LinearPlan plan_lora_linear(LinearShape shape, int processors) {
  LinearPlan best = {};
  each_linear_tile(Shortest{shape, processors, &best});
  return best;
}

std::optional<LinearPlan> plan_lora_linear(LinearShape shape, int processors, int tile_rows,
                                           int tile_columns, int cluster, bool ping_pong) {
  std::optional<LinearPlan> found;
  if (shape.rows <= tile_rows) cluster = std::min(cluster, 1);
  each_linear_tile(Named{shape, processors, tile_rows, tile_columns, cluster, ping_pong, &found});
  return found;
}

void lora_linear(const LinearProblem& problem, const LinearPlan& plan, int device, void* stream) {
  if (plan.tiles == 0) return;
  check(problem, plan);
  const int error = launch_lora_linear(problem, plan, device, stream);
  if (error) throw std::runtime_error(std::string("lora_linear: ") + cuda_error_text(error));
}

}  // namespace fused_lora::sm90
