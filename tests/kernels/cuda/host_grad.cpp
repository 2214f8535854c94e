// The launches of csrc/lora_grad on a CPU: the same kernels, a block at a time, over an emulated
// block.

#include <stdexcept>

#include "lora_grad/add_piece.h"
#include "lora_grad/one_pass.h"

namespace fused_lora {
namespace {

bool backwards = false, late = false, bulk = false;

struct Run {
  const GradProblem& problem;
  const GradPlan& plan;
  float* partial;
  bool* found;

  template <typename T, int S, int RB, bool forms>
  void operator()() const {
    if (plan.most_strips != S || plan.rank_blocks != RB || plan.shape.forms() != forms) return;
    *found = true;
    if (bulk) {
      blocks<OnePass<T, S, RB, forms, true>>();
    } else {
      blocks<OnePass<T, S, RB, forms, false>>();
    }
  }

  template <typename Kernel>
  void blocks() const {
    const int slices = plan.cluster_slices, chunks = plan.cluster_chunks();
    if (plan.slices % slices) throw std::logic_error("slices that are no whole clusters");
    EmulatedCluster cluster(slices * chunks, backwards, late);
    for (int slice = 0; slice < plan.slices; slice += slices) {
      for (int chunk = 0; chunk < plan.chunks; chunk += chunks) {
        cluster.share(plan.smem_bytes);
        cluster.run([&] {
          Kernel(problem, plan, cluster.shared(), slice + cluster.block() % slices,
                 chunk + cluster.block() / slices)
              .run(partial);
        });
      }
    }
  }
};

}  // namespace

int launch_lora_grad(const GradProblem& problem, const GradPlan& plan, float* partial, int device,
                     void*) {
  if (device < 0) return 101;
  bool found = false;
  each_grad_shape(problem.type, Run{problem, plan, partial, &found});
  if (!found) throw std::logic_error("no kernel of the plan's shape");
  return 0;
}

ClusterCounts clusters_at_once(int) { return {}; }

int launch_add_partials(const Sums& sums, int device, void*) {
  if (device < 0) return 101;
  EmulatedCluster block(1, backwards, late);
  for (int i = 0; i < sums.first_block[sums.pieces]; ++i) {
    float shared[kGradWarps][32];
    block.run([&] { add_pieces(sums, shared, i); });
  }
  return 0;
}

}  // namespace fused_lora

// In which order threads take turns, when copies land, and how x and dy are copied, from now on.
extern "C" void host_world(bool threads_backwards, bool copies_late, bool bulk_copies) {
  fused_lora::backwards = threads_backwards, fused_lora::late = copies_late;
  fused_lora::bulk = bulk_copies;
}
