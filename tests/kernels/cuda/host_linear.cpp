// The launch of lora_linear_sm90.cu on a CPU: the same kernels, a block at a time, over an emulated
// block.

#include <stdexcept>

#include "lora_linear_sm90/extended.h"

namespace fused_lora::sm90 {
namespace {

bool backwards = false, late = false;

struct Run {
  const LinearPlan& plan;
  DType type;
  const LinearArguments& arguments;
  bool* found;

  template <typename Tile>
  void operator()() const {
    if (plan.tile_rows != Tile::kRows || plan.tile_columns != Tile::kColumns) return;
    *found = true;
    if (type == DType::kBFloat16) return of<BFloat16, Tile>();
    // The types differ in their rounding alone: one tile shows it, and takes less to compile.
    if constexpr (Tile::kRows == 128 && Tile::kColumns == 128) return of<Float16, Tile>();
    throw std::logic_error("float16 runs on a CPU in tiles of 128 x 128 alone");
  }

  template <typename T, typename Tile>
  void of() const {
    if (plan.shape.right == Right::kColumns) {
      return blocks<Extended<T, Tile, Right::kColumns, Activation::kNone>>();
    }
    switch (plan.shape.activation) {
      case Activation::kErf: return blocks<Extended<T, Tile, Right::kRows, Activation::kErf>>();
      case Activation::kTanh: return blocks<Extended<T, Tile, Right::kRows, Activation::kTanh>>();
      default: return blocks<Extended<T, Tile, Right::kRows, Activation::kNone>>();
    }
  }

  template <typename Kernel>
  void blocks() const {
    EmulatedBlock block(plan.smem_bytes, backwards, late);
    for (int i = 0; i < plan.blocks; ++i) {
      block.run([&] { Kernel(arguments, block.shared(), i, plan.blocks).run(); });
    }
  }
};

}  // namespace

int launch_lora_linear(const LinearProblem& problem, const LinearPlan& plan, int device, void*) {
  if (device < 0) return 101;
  LinearArguments arguments = {};
  if (const int error = make_arguments(problem, plan, &arguments)) return error;
  bool found = false;
  each_linear_tile(Run{plan, problem.type, arguments, &found});
  if (!found) throw std::logic_error("no kernel of the plan's tile");
  return 0;
}

}  // namespace fused_lora::sm90

// In which order threads take turns, and when copies and products land, from now on.
extern "C" void host_linear_world(bool threads_backwards, bool copies_late) {
  fused_lora::sm90::backwards = threads_backwards, fused_lora::sm90::late = copies_late;
}
