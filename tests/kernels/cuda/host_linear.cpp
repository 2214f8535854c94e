// The launch of lora_linear_sm90.cu on a CPU: the same kernels, a cluster at a time, over an
// emulated one.

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
    if (!has_tile<Tile>(plan)) return;
    *found = true;
    if (type == DType::kBFloat16) return of<BFloat16, Tile>();
    // The types differ in their rounding alone: one tile shows it, and takes less to compile.
    constexpr bool kOne = Tile::kRows == 128 && Tile::kColumns == 128 && Tile::kCluster == 1;
    if constexpr (kOne) return of<Float16, Tile>();
    throw std::logic_error("float16 runs on a CPU in tiles of 128 x 128 alone");
  }

  template <typename T, typename Tile>
  void of() const {
    return plan.shape.right == Right::kRows ? side<T, Tile, Right::kRows>()
                                            : side<T, Tile, Right::kColumns>();
  }

  template <typename T, typename Tile, Right right>
  void side() const {
    switch (plan.shape.activation) {
      case Activation::kErf: return blocks<Extended<T, Tile, right, Activation::kErf>>();
      case Activation::kTanh: return blocks<Extended<T, Tile, right, Activation::kTanh>>();
      default: return blocks<Extended<T, Tile, right, Activation::kNone>>();
    }
  }

  template <typename Kernel>
  void blocks() const {
    EmulatedBlocks cluster(plan.cluster, plan.smem_bytes, backwards, late);
    for (int first = 0; first < plan.blocks; first += plan.cluster) {
      cluster.run(
          [&] { Kernel(arguments, cluster.shared(), first + cluster.block(), plan.blocks).run(); });
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

// GELU of every number, or its derivative.
extern "C" void host_gelu(const float* u, int64_t count, bool tanh, bool grad, float* out) {
  using fused_lora::gelu_erf, fused_lora::gelu_tanh, fused_lora::gelu_erf_grad,
      fused_lora::gelu_tanh_grad;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = grad ? (tanh ? gelu_tanh_grad(u[i]) : gelu_erf_grad(u[i]))
                  : (tanh ? gelu_tanh(u[i]) : gelu_erf(u[i]));
  }
}
