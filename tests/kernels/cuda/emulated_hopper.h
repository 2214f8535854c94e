// csrc/common/hopper.h on a CPU: the threads of a block, or of all blocks of a cluster, as fibers,
// beside an engine that copies boxes and one that multiplies. Either works as soon as it is asked,
// or not before the threads can do nothing without it, youngest copy first; a copy to several
// blocks lands in each by itself. Threads run from the first to the last or the other way round. A
// kernel that is right in all these worlds waits where it must.
//
// Written from the PTX manual, not from the kernel: where a box lands and which element a
// descriptor means are worked out here once more.
#pragma once

#include <setjmp.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/tensor_map.h"

namespace fused_lora::sm90 {

class EmulatedBlocks {
 public:
  static constexpr int kThreads = 384;  // of a block
  using Work = std::function<void()>;
  using Widen = float (*)(uint16_t);

  EmulatedBlocks(int blocks, int smem_bytes, bool backwards, bool late);

  // `body` once per thread of each, over shared memory full of NaN. Throws where a rule is broken.
  void run(const Work& body);
  char* shared() { return reinterpret_cast<char*>(kFirst); }  // only ever an address

  int thread() const { return thread_ % kThreads; }
  int block() const { return thread_ / kThreads; }
  void until(const std::function<bool()>& holds, const char* what);
  void meet(int count, const char* what);  // of so many threads, this one among them
  void meet_all(const char* what);

  void init_barrier(uint32_t at, int arrivals);
  void publish_barriers();
  void arrive(uint32_t at, int bytes);
  void arrive_at(int block, uint32_t at);
  void wait_for(uint32_t at, uint32_t parity);

  void load_box(uint32_t blocks, uint32_t to, const TensorMap& map, int column, int row,
                uint32_t barrier);
  void store_box(const TensorMap& map, int column, int row, uint32_t from);
  void commit_stores();
  void wait_stores_read();
  void store_matrices(uint32_t row, const uint32_t (&from)[4]);
  void publish_writes();

  void begin_products();
  void multiply(float* sum, int count, uint64_t left, uint64_t right, bool transposed, bool add,
                Widen widen);
  void commit_products();
  void wait_products(size_t open);

 private:
  // Of shared memory, as a kernel may find it: not where swizzles begin to repeat.
  static constexpr uint32_t kFirst = 1024 + 16;

  struct Barrier {
    int arrivals, missing, bytes = 0;
    uint32_t phase = 0;
  };
  struct Fiber {
    jmp_buf place;
    bool started = false, done = false, fenced = false;
    std::vector<char> stack;
    std::function<bool()> holds;
    const char* waits_for = "";
    std::vector<Work> open_stores, stores, writes;
  };
  struct Product {
    uint64_t left, right;
    bool transposed, add;
    int count;
    Widen widen;
    int block;
    float* sum[128];
  };
  struct Warpgroup {
    Product next;
    int issued = 0;
    std::vector<Product> open;
    std::vector<std::vector<Product>> groups;
    int committed = 0;
  };

  static void enter();
  void start(Fiber& fiber);
  bool turn(int thread);
  bool run_warp(int first);
  bool land();
  Fiber& me() { return fibers_[thread_]; }
  Warpgroup& warpgroup() { return warpgroups_[thread_ / 128]; }
  bool gone(int block) const;
  Barrier& barrier(int block, uint32_t at);
  void settle(Barrier& barrier);
  uint16_t& element(int block, uint32_t address);
  uint16_t operand(int block, uint64_t descriptor, int row, int depth, bool transposed);
  void compute(const Product& product);

  struct Block {
    std::vector<uint16_t> memory;
    std::map<uint32_t, Barrier> barriers;
    bool published = false;
  };

  bool backwards_, late_;
  std::vector<Block> blocks_;
  std::vector<Fiber> fibers_;  // of all blocks, as are warpgroups
  std::vector<Work> loads_;
  std::vector<Warpgroup> warpgroups_;
  struct Meeting {
    int waiting = 0, round = 0;
  };
  std::map<int, Meeting> meetings_;  // by first thread and count
  int thread_ = 0;                   // of all
  jmp_buf scheduler_;
  Work body_;
  std::exception_ptr error_;
};

extern EmulatedBlocks* emulated_blocks;  // those that run

inline int thread_index() { return emulated_blocks->thread(); }
inline void sync_block() { emulated_blocks->meet(EmulatedBlocks::kThreads, "sync_block"); }
inline void sync_cluster() { emulated_blocks->meet_all("sync_cluster"); }
inline void sync_warpgroup(int) { emulated_blocks->meet(128, "sync_warpgroup"); }
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pointer));
}
template <int count>
void give_registers() {}
template <int count>
void take_registers() {}
inline void init_barrier(uint32_t at, int arrivals) { emulated_blocks->init_barrier(at, arrivals); }
inline void publish_barriers() { emulated_blocks->publish_barriers(); }
inline void arrive(uint32_t at) { emulated_blocks->arrive(at, 0); }
inline void arrive_expecting(uint32_t at, int bytes) { emulated_blocks->arrive(at, bytes); }
inline void arrive_at(int block, uint32_t at) { emulated_blocks->arrive_at(block, at); }
inline void wait_for(uint32_t at, uint32_t parity) { emulated_blocks->wait_for(at, parity); }
inline void load_box(uint32_t to, const TensorMap& map, int column, int row, uint32_t barrier) {
  emulated_blocks->load_box(1u << emulated_blocks->block(), to, map, column, row, barrier);
}
inline void load_box_to(uint16_t blocks, uint32_t to, const TensorMap& map, int column, int row,
                        uint32_t barrier) {
  emulated_blocks->load_box(blocks, to, map, column, row, barrier);
}
inline void store_box(const TensorMap& map, int column, int row, uint32_t from) {
  emulated_blocks->store_box(map, column, row, from);
}
inline void commit_stores() { emulated_blocks->commit_stores(); }
inline void wait_stores_read() { emulated_blocks->wait_stores_read(); }
inline void store_matrices(uint32_t row, const uint32_t (&from)[4]) {
  emulated_blocks->store_matrices(row, from);
}
inline void publish_writes() { emulated_blocks->publish_writes(); }
inline void begin_products() { emulated_blocks->begin_products(); }
inline void commit_products() { emulated_blocks->commit_products(); }
template <int open>
void wait_products() {
  emulated_blocks->wait_products(open);
}
template <int count>
void settle(float (&)[count]) {}

template <typename T>
float widen_element(uint16_t bits) {
  return widen(T{bits});
}

template <typename T, bool transposed, int count>
void multiply(float (&sum)[count], uint64_t left, uint64_t right, int add) {
  emulated_blocks->multiply(sum, count, left, right, transposed, add, widen_element<T>);
}

}  // namespace fused_lora::sm90
