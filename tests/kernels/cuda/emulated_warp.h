// csrc/common/warp.h on a CPU: the threads of a block or cluster as fibers. A warp, and a block,
// runs as far as it gets without the others, from the first warp to the last or the other way
// round; copies land as they are issued, or not before they are waited for. A kernel that is right
// in all four worlds waits where it must.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <stdexcept>
#include <vector>

#include "common/dtype.h"

namespace fused_lora {

struct EmulatedCopy {
  void* to;
  const void* from;
  bool inside;
  int bytes = 16;
};

// What a barrier of bulk copies has seen of its lap.
struct EmulatedBarrier {
  int lap = 0, arrived = 0;
  int bytes = 0;  // expected, less those that have landed
  std::vector<EmulatedCopy> copies;
};

class EmulatedCluster {
 public:
  static constexpr int kThreads = 256;  // of a block
  enum class Scope { kNone, kWarp, kBlock, kCluster };

  EmulatedCluster(int blocks, bool backwards, bool late);

  // Shared memory of each block in the next run: NaN, then a fence.
  void share(int bytes);
  char* shared() { return blocks_[block()].data(); }

  // `body` once per thread. Throws where a fence is broken or threads of a warp part ways.
  void run(const std::function<void()>& body);

  int block() const { return thread_ / kThreads; }
  int thread() const { return thread_ % kThreads; }
  void sync(const char* what, Scope scope);
  float remote(const float* mine, int block);
  void load(uint32_t (&to)[4], const void* row, bool transposed);
  void copy(void* shared, const void* global, bool inside);
  void commit();
  void wait(int open);
  void init_barrier(uint64_t* barrier);
  void fence() { fibers_[thread_].fenced = true; }
  void expect(uint64_t* barrier, int bytes);
  void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier);
  void wait_barrier(uint64_t* barrier, int lap);

  // What the lanes of a warp bring to one instruction.
  struct Exchange {
    const void* row[32];
    uint32_t a[32][4], b[32][2];
  };
  Exchange& exchange() { return exchanges_[thread_ / 32]; }

 private:
  struct Fiber {
    jmp_buf place;
    bool started = false;
    std::vector<char> stack;
    const char* waits_for = "";
    Scope scope = Scope::kNone;
    bool done = false;
    bool fenced = false;  // since the run began
    std::vector<std::vector<EmulatedCopy>> groups{1};
  };

  static void enter();
  void start(Fiber& fiber);
  void turn(int thread);
  void run_block(int first);
  void run_warp(int first);
  bool release_warp(int first);
  bool release(int first, int count, Scope scope);
  void check_fences() const;
  void require_shared(const void* at, int bytes) const;
  EmulatedBarrier& known(uint64_t* barrier);
  static void land(const EmulatedCopy& copy);

  std::vector<std::vector<char>> blocks_;
  std::map<uint64_t*, EmulatedBarrier> barriers_;
  int shared_bytes_ = 0;
  bool backwards_, late_;
  int thread_ = 0;
  jmp_buf scheduler_;
  std::vector<Fiber> fibers_;
  std::vector<Exchange> exchanges_;
  std::function<void()> body_;
  std::exception_ptr error_;
};

extern EmulatedCluster* emulated;  // the one that runs

#define FL_CLUSTERS true

inline int thread_index() { return emulated->thread(); }
inline bool elected() { return emulated->thread() % 32 == 0; }
inline int of_first_lane(int number) { return number; }  // asked for what all lanes have
inline void sync_warp() { emulated->sync("sync_warp", EmulatedCluster::Scope::kWarp); }
inline void sync_block() { emulated->sync("sync_block", EmulatedCluster::Scope::kBlock); }
inline void sync_cluster() { emulated->sync("sync_cluster", EmulatedCluster::Scope::kCluster); }
inline int cluster_rank() { return emulated->block(); }
inline float load_cluster(const float* mine, int rank) { return emulated->remote(mine, rank); }
inline void load_cluster(float (&to)[4], const float* mine, int rank) {
  if (reinterpret_cast<uintptr_t>(mine) % 16) throw std::logic_error("a remote read not aligned");
  for (int i = 0; i < 4; ++i) to[i] = emulated->remote(mine + i, rank);
}
inline void load_matrices(uint32_t (&to)[4], const void* row) { emulated->load(to, row, false); }
inline void load_transposed(uint32_t (&to)[4], const void* row) { emulated->load(to, row, true); }
inline void copy_16(void* shared, const void* global, bool inside) {
  emulated->copy(shared, global, inside);
}
inline void init_barrier(uint64_t* barrier) { emulated->init_barrier(barrier); }
inline void fence_copies() { emulated->fence(); }
inline void fence_writes() {}
inline void expect_bytes(uint64_t* barrier, int bytes) { emulated->expect(barrier, bytes); }
inline void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  emulated->copy_bulk(shared, global, bytes, barrier);
}
inline void wait_barrier(uint64_t* barrier, int lap) { emulated->wait_barrier(barrier, lap); }
inline void commit_copies() { emulated->commit(); }

template <int open>
void wait_copies() {
  emulated->wait(open);
}

// Products and their sum are exact in double; the addition to `sum` rounds once.
void multiply_as(float (&widen)(uint16_t), float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                 uint32_t b1);

template <typename T>
float widen_bits(uint16_t bits) {
  return widen(T{bits});
}

template <typename T>
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_as(widen_bits<T>, sum, a, b0, b1);
}

// Half as deep. Throws where an operand has more bits than TF32, which a GPU would cut off.
template <>
void multiply<TFloat32>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

}  // namespace fused_lora
