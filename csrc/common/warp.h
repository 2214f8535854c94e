// The instructions that a warp executes together, by name: of sm_80, and of sm_90 for clusters. A
// C++ compiler takes them from the tests' emulation instead, and then runs a kernel's own source.
#pragma once

#include <cstdint>

#include "common/dtype.h"

#ifndef __CUDACC__
#include "emulated_warp.h"
#else

namespace fused_lora {

FL_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }

FL_DEVICE void sync_block() { __syncthreads(); }

FL_DEVICE void sync_warp() { __syncwarp(); }

// What the first lane has, which the compiler then knows to be one number.
FL_DEVICE int of_first_lane(int number) { return __shfl_sync(0xffffffff, number, 0); }

FL_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Blocks of a cluster, which only sm_90 and later have.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FL_CLUSTERS true

FL_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Of this block.
FL_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// What block `rank` of the cluster has where this block has `mine`.
FL_DEVICE float load_cluster(const float* mine, int rank) {
  float value;
  asm volatile(
      "{\n.reg .u32 at;\nmapa.shared::cluster.u32 at, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [at];\n}"
      : "=f"(value)
      : "r"(shared_address(mine)), "r"(rank)
      : "memory");
  return value;
}

// Four neighbours of it, at a multiple of 16 bytes.
FL_DEVICE void load_cluster(float (&to)[4], const float* mine, int rank) {
  asm volatile(
      "{\n.reg .u32 at;\nmapa.shared::cluster.u32 at, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [at];\n}"
      : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
      : "r"(shared_address(mine)), "r"(rank)
      : "memory");
}

// True in one lane. The compiler knows that it is one.
FL_DEVICE bool elected() {
  uint32_t is;
  asm volatile("{\n.reg .pred is;\nelect.sync _|is, 0xffffffff;\nselp.u32 %0, 1, 0, is;\n}"
               : "=r"(is));
  return is;
}

// One thread arrives at a barrier, saying how many bytes of bulk copies end with it.
#define FL_BULK_COPIES true

FL_DEVICE void init_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// Before the first copy: barriers, and what threads wrote where copies will.
FL_DEVICE void fence_copies() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

// Between what this thread wrote to shared memory and a copy to the same place.
FL_DEVICE void fence_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

FL_DEVICE void expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// A multiple of 16 bytes, between multiples of 16 bytes.
FL_DEVICE void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Until the copies of the lap are there; laps are 0, 1, 0, 1, ...
FL_DEVICE void wait_barrier(uint64_t* barrier, int lap) {
  asm volatile(
      "{\n.reg .pred there;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n@!there bra again;\n}" ::"r"(
          shared_address(barrier)),
      "r"(lap)
      : "memory");
}
#else
#define FL_CLUSTERS false
#define FL_BULK_COPIES false

FL_DEVICE void sync_cluster() {}
FL_DEVICE int cluster_rank() { return 0; }
FL_DEVICE float load_cluster(const float*, int) { return 0.0f; }
FL_DEVICE void load_cluster(float (&)[4], const float*, int) {}
FL_DEVICE bool elected() { return false; }
FL_DEVICE void init_barrier(uint64_t*) {}
FL_DEVICE void fence_copies() {}
FL_DEVICE void fence_writes() {}
FL_DEVICE void expect_bytes(uint64_t*, int) {}
FL_DEVICE void copy_bulk(void*, const void*, int, uint64_t*) {}
FL_DEVICE void wait_barrier(uint64_t*, int) {}
#endif

// Four 8 x 8 matrices of 16-bit elements. Lane l points at row l % 8 of matrix l / 8, and gets the
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each.
FL_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices.
FL_DEVICE void load_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum [16, 8] += a [16, 16] b [16, 8], of TF32 a [16, 8] b [8, 8]
template <typename T>
FL_DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define FL_MULTIPLY(Type, shape, name)                                                \
  template <>                                                                         \
  FL_DEVICE void multiply<Type>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, \
                                uint32_t b1) {                                        \
    asm("mma.sync.aligned." shape ".row.col.f32." name "." name                       \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"        \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                      \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));              \
  }
FL_MULTIPLY(BFloat16, "m16n8k16", "bf16")
FL_MULTIPLY(Float16, "m16n8k16", "f16")
FL_MULTIPLY(TFloat32, "m16n8k8", "tf32")
#undef FL_MULTIPLY

// 16 bytes to shared memory behind the thread's back; zeros, and no read, when not `inside`.
FL_DEVICE void copy_16(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(inside ? 16 : 0)
               : "memory");
}

// Closes a group of copies, maybe an empty one.
FL_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `open` of this thread's youngest groups are still under way.
template <int open>
FL_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
}

}  // namespace fused_lora

#endif
