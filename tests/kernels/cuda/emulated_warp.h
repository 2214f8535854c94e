// csrc/common/warp.h on a CPU: a block of threads as fibers, which take turns only where a kernel
// waits or a warp acts together. Each turn goes from the first thread to the last, or the other way
// round; copies land as they are issued, or not before they are waited for. A kernel that is right
// in all four worlds waits where it must.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <vector>

#include "common/dtype.h"

namespace fused_lora {

struct EmulatedCopy {
  void* to;
  const void* from;
  bool inside;
};

class EmulatedBlock {
 public:
  static constexpr int kThreads = 256;

  EmulatedBlock(bool backwards, bool late);

  // Shared memory of the next run: NaN, then a fence.
  char* share(int bytes);

  // `body` once per thread. Throws where the fence is broken or threads of a warp part ways.
  void run(const std::function<void()>& body);

  int thread() const { return thread_; }
  void sync(const char* what);
  void sync_warp(const char* what);
  void load(uint32_t (&to)[4], const void* row, bool transposed);
  void copy(void* shared, const void* global, bool inside);
  void commit();
  void wait(int open);

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
    bool whole_block = false, done = false;
    std::vector<std::vector<EmulatedCopy>> groups{1};
  };

  static void enter();
  void start(Fiber& fiber);
  void pause(const char* what, bool whole_block);
  void turn(int thread);
  void release_warp(int first);
  void release_block();
  void require_shared(const void* at, int bytes) const;
  static void land(const EmulatedCopy& copy);

  std::vector<char> shared_;
  int shared_bytes_ = 0;
  bool backwards_, late_;
  int thread_ = 0;
  jmp_buf scheduler_;
  std::vector<Fiber> fibers_;
  Exchange exchanges_[kThreads / 32];
  std::function<void()> body_;
  std::exception_ptr error_;
};

extern EmulatedBlock* emulated;  // the block that runs

inline int thread_index() { return emulated->thread(); }
inline void sync_block() { emulated->sync("sync_block"); }
inline void sync_warp() { emulated->sync_warp("sync_warp"); }
inline void load_matrices(uint32_t (&to)[4], const void* row) { emulated->load(to, row, false); }
inline void load_transposed(uint32_t (&to)[4], const void* row) { emulated->load(to, row, true); }
inline void copy_16(void* shared, const void* global, bool inside) {
  emulated->copy(shared, global, inside);
}
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

}  // namespace fused_lora
