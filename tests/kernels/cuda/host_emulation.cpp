// Small kernels that are right or wrong on purpose: what the emulation must see.

#include <functional>
#include <stdexcept>

#include "emulated_warp.h"

namespace fused_lora {
namespace {

constexpr int kThreads = EmulatedCluster::kThreads, kBytes = 16 * kThreads;

// How many threads do not find what a neighbour, 33 threads on, has brought to shared memory.
int misses(EmulatedCluster& cluster, bool waits, bool syncs) {
  alignas(16) float global[4 * kThreads];
  for (int i = 0; i < 4 * kThreads; ++i) global[i] = static_cast<float>(i);
  int missing = 0;
  cluster.share(kBytes);
  cluster.run([&] {
    float* shared = reinterpret_cast<float*>(cluster.shared());
    copy_16(shared + 4 * thread_index(), global + 4 * thread_index(), true);
    commit_copies();
    if (waits) wait_copies<0>();
    if (syncs) sync_block();
    const int next = (thread_index() + 33) % kThreads;
    missing += !(shared[4 * next] == global[4 * next]);
  });
  return missing;
}

// The same of the other block of a cluster.
int remote_misses(EmulatedCluster& cluster, bool syncs, bool stays) {
  int missing = 0;
  cluster.share(kBytes);
  cluster.run([&] {
    float* mine = reinterpret_cast<float*>(cluster.shared()) + thread_index();
    *mine = static_cast<float>(cluster.block());
    if (syncs) sync_cluster();
    const int other = 1 - cluster.block();
    missing += !(load_cluster(mine, other) == static_cast<float>(other));
    if (stays) sync_cluster();
  });
  return missing;
}

void wrong(int kind) {
  EmulatedCluster cluster(1, false, false);
  cluster.share(kBytes);
  cluster.run([&] {
    if (kind == 0) cluster.shared()[kBytes + thread_index()] = 0;
    if (kind == 1 && thread_index() % 32 == 7) sync_warp();
    if (kind == 2 && thread_index() < 128) sync_block();
    uint32_t words[4];
    if (kind == 3) load_matrices(words, cluster.shared() + kBytes);
    if (kind == 4) copy_16(cluster.shared() + 8, cluster.shared(), true);
  });
}

}  // namespace
}  // namespace fused_lora

using namespace fused_lora;

extern "C" {

int host_misses(bool waits, bool syncs, bool backwards, bool late) {
  EmulatedCluster cluster(1, backwards, late);
  return misses(cluster, waits, syncs);
}

// -1 where a block reads of one that has left.
int host_remote_misses(bool syncs, bool stays, bool backwards) {
  EmulatedCluster cluster(2, backwards, false);
  try {
    return remote_misses(cluster, syncs, stays);
  } catch (const std::logic_error&) {
    return -1;
  }
}

// Whether the emulation refuses a kernel that is wrong in this way.
bool host_refuses(int kind) {
  try {
    wrong(kind);
  } catch (const std::logic_error&) {
    return true;
  }
  return false;
}

}  // extern "C"
