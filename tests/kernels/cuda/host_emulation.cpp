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

// The same by bulk copies of a warp each, and in a second lap those of the warp after it.
int bulk_misses(EmulatedCluster& cluster, bool waits, bool says) {
  alignas(16) float global[4 * kThreads + 128];
  for (int i = 0; i < 4 * kThreads + 128; ++i) global[i] = static_cast<float>(i);
  int missing = 0;
  cluster.share(kBytes + 64);
  cluster.run([&] {
    const int warp = thread_index() / 32;
    float* shared = reinterpret_cast<float*>(cluster.shared()) + 128 * warp;
    uint64_t* barrier = reinterpret_cast<uint64_t*>(cluster.shared() + kBytes) + warp;
    if (thread_index() % 32 == 0) init_barrier(barrier);
    fence_copies();
    sync_warp();
    for (int lap = 0; lap < 2; ++lap) {
      if (thread_index() % 32 == 0) expect_bytes(barrier, says ? 512 : 256);
      sync_warp();
      const int from = 128 * (warp + lap), part = thread_index() % 32 * 64;
      if (part < 128) copy_bulk(shared + part, global + from + part, 256, barrier);
      if (waits) wait_barrier(barrier, lap);
      missing += !(shared[4 * (thread_index() % 32)] == global[from + 4 * (thread_index() % 32)]);
      sync_warp();
    }
    if (!waits) wait_barrier(barrier, 0);
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
    uint64_t* barrier = reinterpret_cast<uint64_t*>(cluster.shared()) + thread_index();
    if (kind == 5) wait_barrier(barrier, 0);
    float sum[4] = {};
    if (kind == 9) multiply<TFloat32>(sum, {0, 0, 0, bits_of(0.1f)}, 0, 0);
    if (kind >= 6) init_barrier(barrier);
    if (kind == 6) copy_bulk(cluster.shared(), cluster.shared(), 16, barrier);  // no fence
    fence_copies();
    if (kind == 7) copy_bulk(cluster.shared(), cluster.shared(), 8, barrier);
    if (kind == 8) copy_bulk(cluster.shared(), cluster.shared(), 16, barrier);  // nobody waits
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

// -1 where a lap never ends.
int host_bulk_misses(bool waits, bool says, bool backwards, bool late) {
  EmulatedCluster cluster(1, backwards, late);
  try {
    return bulk_misses(cluster, waits, says);
  } catch (const std::logic_error&) {
    return -1;
  }
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
