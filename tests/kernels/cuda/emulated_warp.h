// csrc/common/warp.h on a CPU: a block of threads as fibers, which take turns only where a kernel
// waits or a warp acts together. Each turn goes from the first thread to the last, or the other way
// round; copies land as they are issued, or not before they are waited for. A kernel that is right
// in all four worlds waits where it must.
#pragma once

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

  EmulatedBlock(int shared_bytes, bool backwards, bool late);

  // Shared memory, NaN at first, then a fence.
  char* shared() { return shared_.data(); }

  // `body` once per thread. Throws where a fence is broken or threads of a warp part ways.
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
    ucontext_t context;
    std::vector<char> stack;
    const char* waits_for = "";
    bool whole_block = false, done = false;
    std::vector<std::vector<EmulatedCopy>> groups{1};
  };

  static void enter();
  void pause(const char* what, bool whole_block);
  void turn(int thread);
  void release_warp(int first);
  void release_block();
  void require_shared(const void* at, int bytes) const;
  static void land(const EmulatedCopy& copy);

  std::vector<char> shared_;
  int shared_bytes_;
  bool backwards_, late_;
  int thread_ = 0;
  ucontext_t scheduler_;
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
template <typename T>
void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  EmulatedBlock::Exchange& warp = emulated->exchange();
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) warp.a[lane][i] = a[i];
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  emulated->sync_warp("multiply");
  const auto element = [](uint32_t word, int half) {
    return static_cast<double>(widen(T{static_cast<uint16_t>(word >> 16 * half)}));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    double total = 0;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = warp.a[row * 4 + k % 8 / 2][k / 8 * 2 + i / 2];
      const uint32_t right = warp.b[column * 4 + k % 8 / 2][k / 8];
      total += element(left, k % 2) * element(right, k % 2);
    }
    sum[i] = static_cast<float>(sum[i] + total);
  }
  emulated->sync_warp("multiply");
}

}  // namespace fused_lora
