#include "lora_grad/lora_grad.h"

#include <algorithm>
#include <stdexcept>

#include "common/error.h"
#include "lora_grad/layout.h"

namespace fused_lora {
namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }

int warps_for(const GradPlan& plan, int strips) {
  return ceil_div(plan.x_strips, strips) + ceil_div(plan.dy_strips, strips);
}

// The first compiled shape, narrow before wide, that holds the problem in a cluster of so many.
struct Choose {
  GradPlan* plan;
  int limit_bytes;
  int cluster_blocks;
  bool* chosen;
  int* bytes_of_totals;  // 0 where a block cannot hold them

  template <typename T, int S, int RB, bool forms>
  void operator()() const {
    using L = GradLayout<T, S, RB, forms>;
    if (*chosen || forms != plan->shape.forms()) return;
    const bool cluster = cluster_blocks > 1;
    if (L::kRanks < plan->shape.all_ranks()) return;
    if (L::bytes(kLeastStages, cluster) > limit_bytes) return;
    const int needed = std::max(1, ceil_div(warps_for(*plan, S), kGradWarps));
    if (forms && needed > cluster_blocks) return;
    const int chunks = forms ? cluster_blocks : needed;
    *chosen = true;
    plan->blocks = L::kBlocks;
    plan->most_strips = S, plan->rank_blocks = RB, plan->chunks = chunks;
    plan->stages = L::stages(limit_bytes, cluster);
    plan->smem_bytes = L::bytes(plan->stages, cluster);
    *bytes_of_totals = L::kBytesOfTotals <= L::most_bytes(limit_bytes) ? L::kBytesOfTotals : 0;
  }
};

struct Processors {
  int count;
  ClusterCounts clusters;
};

// Blocks that a chip runs at once in clusters of so many. A cluster lives inside a group of
// processors, of which each is whole pairs. Groups differ, and what is left of each serves none: an
// H100's 132 have 120 in clusters of eight, and would have 124 in clusters of four where one group
// is short of 16. So much is taken for granted where the chip has not been asked.
int64_t at_once(const GradPlan& plan, Processors processors, int cluster) {
  const int taken = ceil_div(cluster, plan.blocks);
  const int known = taken == 4   ? processors.clusters.fours
                    : taken == 8 ? processors.clusters.eights
                                 : -1;
  int count = processors.count;
  if (taken > 2 && known >= 0) {
    count = std::min(count, known * taken);
  } else if (taken > 2 && count > 16) {
    count -= count / 16;
  }
  return static_cast<int64_t>(count) * plan.blocks / cluster * cluster;
}

// As many slices as blocks run at once, and as many of them in a cluster as leave idle no more than
// a sixteenth of what is busy without: each doubling halves what is written and read again.
void share_out(GradPlan& plan, int64_t tiles, Processors processors, int most_blocks) {
  const auto slices = [&](int together) {
    const int64_t blocks = at_once(plan, processors, plan.cluster_chunks() * together);
    const int64_t wanted = (tiles + together - 1) / together * together;
    return std::min(wanted, blocks / (plan.chunks * together) * together);
  };
  const int64_t alone = std::max<int64_t>(1, slices(1));
  plan.slices = static_cast<int32_t>(alone), plan.cluster_slices = 1;
  for (int n = 2; n <= tiles && n * plan.cluster_chunks() <= most_blocks; n *= 2) {
    if (slices(n) == 0 || 16 * slices(n) < 15 * alone) continue;
    plan.slices = static_cast<int32_t>(slices(n)), plan.cluster_slices = n;
  }
}

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument("lora_grad: " + what);
}

bool begins_at_16(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

void check_side(const GradSide& side, int bytes, const std::string& name) {
  require(begins_at_16(side.z) && side.row * bytes % 16 == 0,
          name + " must begin, and each of its rows, at a multiple of 16 bytes");
}

void check_source(const GradProblem& problem, const GradShape& shape) {
  const GradNorm& norm = problem.norm;
  const bool active = problem.activation != Activation::kNone;
  require((!active && !norm.mean) || !shape.tf32,
          "x is formed of what is given of 16 bits, planned for fp32");
  require(!active || !norm.mean, "x is an activation or a LayerNorm, not both");
  require((norm.mean != nullptr) == (norm.rstd != nullptr), "mean and rstd are given together");
  require(norm.mean || (!norm.gamma && !norm.beta), "gamma and beta are given without mean");
  require(begins_at_16(norm.gamma) && begins_at_16(norm.beta),
          "gamma and beta must begin at a multiple of 16 bytes");
}

void check_groups(const GradProblem& problem, const GradShape& shape) {
  require(problem.groups >= 1 && problem.groups <= kMostGroups,
          "serves 1 to 4 groups, got " + std::to_string(problem.groups));
  int first = 0;
  for (int g = 0; g < problem.groups; ++g) {
    const GradGroup& group = problem.group[g];
    const bool inside = group.first_column >= 0 && group.columns >= 0 &&
                        (!shape.reads_dy() || group.first_column + group.columns <= shape.n);
    require(inside && group.rank >= 0 && group.first_rank == first,
            "group " + std::to_string(g) + " has columns or ranks out of place");
    first += group.rank;
  }
  require(first == shape.ranks, "the groups have " + std::to_string(first) +
                                    " ranks, planned were " + std::to_string(shape.ranks));
}

void check(const GradProblem& problem, const GradPlan& plan) {
  const GradShape& shape = plan.shape;
  require(
      problem.x.columns == shape.k && problem.dy.columns == shape.n && problem.ranks == shape.ranks,
      "the plan was made for another problem");
  check_groups(problem, shape);
  require((problem.type == DType::kFloat32) == shape.tf32,
          std::string("planned for x and dy of ") + (shape.tf32 ? "fp32" : "16 bits"));
  require(!problem.dh || shape.forms_dh(), "dh is written where it is formed, and it is given");
  require(!problem.dh || problem.dh_row >= problem.ranks, "rows of the written dh overlap");
  if (problem.rows == 0) return;  // tensors of no elements may have no address
  check_source(problem, shape);
  require(shape.h_given == (problem.x.given != nullptr) &&
              shape.dh_given == (problem.dy.given != nullptr),
          "h and dh must be given as planned");
  require(!shape.writes_dh || shape.dh_given || problem.dh, "dh must be written as planned");
  if (shape.reads_x()) check_side(problem.x, shape.bytes(), "x");
  if (shape.reads_dy()) check_side(problem.dy, shape.bytes(), "dy");
}

}  // namespace

std::optional<GradPlan> plan_lora_grad(GradShape shape, int64_t rows, int arch, int processors,
                                       ClusterCounts counts) {
  if (shape.k * shape.bytes() % 16 || shape.n * shape.bytes() % 16) return std::nullopt;
  if (shape.all_ranks() > kMostRanks) return std::nullopt;
  GradPlan plan = {};
  plan.shape = shape;
  plan.x_strips = shape.reads_x() ? ceil_div(shape.k, 16) : 0;
  plan.dy_strips = shape.reads_dy() ? ceil_div(shape.n, 16) : 0;
  bool chosen = false;
  int bytes_of_totals = 0;
  for (int blocks = 1; blocks <= most_cluster_blocks(arch); blocks *= 2) {
    const Choose choose{&plan, smem_limit_bytes(arch), blocks, &chosen, &bytes_of_totals};
    shape.tf32 ? each_grad_shape<TFloat32>(choose) : each_grad_shape<BFloat16>(choose);
  }
  if (!chosen) return std::nullopt;
  const int warps = plan.chunks * kGradWarps;
  plan.strips_per_warp = 1;
  while (warps_for(plan, plan.strips_per_warp) > warps) ++plan.strips_per_warp;
  plan.x_warps = ceil_div(plan.x_strips, plan.strips_per_warp);
  const int64_t tiles = (rows + tile_rows(shape.tf32) - 1) / tile_rows(shape.tf32);
  const int most_blocks = most_slice_cluster_blocks(arch, counts.fours >= 0);
  share_out(plan, tiles, {processors, counts}, bytes_of_totals ? most_blocks : 1);
  if (plan.cluster_slices > 1) plan.smem_bytes = std::max(plan.smem_bytes, bytes_of_totals);
  return plan;
}

void lora_grad(const GradProblem& problem, const GradPlan& plan, float* partial, int device,
               void* stream) {
  check(problem, plan);
  if (plan.columns() == 0) return;
  const int error = launch_lora_grad(problem, plan, partial, device, stream);
  if (error) throw std::runtime_error(std::string("lora_grad: ") + cuda_error_text(error));
}

}  // namespace fused_lora
