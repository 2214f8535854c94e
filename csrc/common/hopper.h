// The instructions of sm_90 that move tiles and multiply them behind a thread's back, by name. A
// C++ compiler takes them from the tests' emulation instead, and then runs a kernel's own source.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/tensor_map.h"

#ifndef __CUDACC__
#include "emulated_hopper.h"
#else

#include "common/wgmma.h"

namespace fused_lora::sm90 {

FL_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }

FL_DEVICE void sync_block() { __syncthreads(); }

// Of one warpgroup; barrier 0 is the block's.
FL_DEVICE void sync_warpgroup(int barrier) {
  asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
}

FL_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// How many registers each thread of this warpgroup has from here on.
template <int count>
FL_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
FL_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// A phase ends when all arrivals and all announced bytes are there; phases alternate in parity. All
// of these take the shared address of eight bytes.
FL_DEVICE void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Barriers just initialised, to the other threads, once the block has met, and to copies.
FL_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

FL_DEVICE void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes that copies will bring.
FL_DEVICE void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Until the phase of this parity has ended; before the first phase, the one of parity 1 has.
FL_DEVICE void wait_for(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// Until all threads of the cluster's blocks are here, and what they wrote is seen.
FL_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// arrive(), at the barrier that this block of the cluster has at the same place. It says that
// products have read shared memory, for copies to come: nothing that this thread wrote has to be
// seen there, and a release at cluster scope would be a fence of the whole GPU in every stage.
FL_DEVICE void arrive_at(int block, uint32_t barrier) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

// The box of the map's matrix that starts here, to shared memory; zeros where it leaves the matrix.
FL_DEVICE void load_box(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// The same to this place of every block of the cluster whose bit is set, and to the barrier that
// each has at this one's place.
FL_DEVICE void load_box_to(uint16_t blocks, uint32_t to, const TensorMap& map, int column, int row,
                           uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

// The way back; what would leave the matrix stays.
FL_DEVICE void store_box(const TensorMap& map, int column, int row, uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
      "r"(from), "r"(column), "r"(row)
      : "memory");
}

FL_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until shared memory has been read by all stores that this thread has committed.
FL_DEVICE void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// What this thread wrote to shared memory, to copies and products that start later.
FL_DEVICE void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements. Lane l points at row l % 8 of matrix l / 8, and gives the
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each.
FL_DEVICE void store_matrices(uint32_t row, const uint32_t (&from)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
}

}  // namespace fused_lora::sm90

#endif
