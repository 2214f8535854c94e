#include "emulated_warp.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace fused_lora {

EmulatedCluster* emulated = nullptr;

namespace {

constexpr int kStackBytes = 64 << 10, kFenceBytes = 1 << 10;

}  // namespace

EmulatedCluster::EmulatedCluster(int blocks, bool backwards, bool late)
    : blocks_(blocks),
      backwards_(backwards),
      late_(late),
      fibers_(blocks * kThreads),
      exchanges_(blocks * kThreads / 32) {
  for (Fiber& fiber : fibers_) fiber.stack.resize(kStackBytes);
}

void EmulatedCluster::share(int bytes) {
  shared_bytes_ = bytes;
  for (std::vector<char>& block : blocks_) block.assign(bytes + kFenceBytes, '\xFF');
}

void EmulatedCluster::run(const std::function<void()>& body) {
  emulated = this;
  body_ = body;
  const int threads = static_cast<int>(fibers_.size());
  for (Fiber& fiber : fibers_) fiber.started = fiber.done = fiber.fenced = false;
  barriers_.clear();
  for (bool busy = true; busy;) {
    for (int i = 0; i < threads; i += kThreads) run_block(backwards_ ? threads - kThreads - i : i);
    release(0, threads, Scope::kCluster);
    busy = false;
    for (const Fiber& fiber : fibers_) busy |= !fiber.done;
  }
  check_fences();
  for (const auto& [barrier, seen] : barriers_) {
    if (!seen.copies.empty()) throw std::logic_error("a block left before its bulk copies landed");
  }
}

// As far as it gets without other blocks, and each of its warps without other warps: no kernel may
// count on them being as far.
void EmulatedCluster::run_block(int first) {
  do {
    for (int i = 0; i < kThreads; i += 32) run_warp(first + (backwards_ ? kThreads - 32 - i : i));
  } while (release(first, kThreads, Scope::kBlock));
}

void EmulatedCluster::run_warp(int first) {
  do {
    for (int i = 0; i < 32; ++i) turn(backwards_ ? first + 31 - i : first + i);
  } while (release_warp(first));
}

void EmulatedCluster::check_fences() const {
  for (const std::vector<char>& block : blocks_) {
    for (size_t i = shared_bytes_; i < block.size(); ++i) {
      if (block[i] != '\xFF') throw std::logic_error("a write beyond shared memory");
    }
  }
}

void EmulatedCluster::enter() {
  Fiber& fiber = emulated->fibers_[emulated->thread_];
  try {
    emulated->body_();
  } catch (...) {
    emulated->error_ = std::current_exception();
  }
  fiber.done = true;
  _longjmp(emulated->scheduler_, 1);
}

// A context is made once; from then on fibers jump, which takes no system call.
void EmulatedCluster::start(Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.data();
  context.uc_stack.ss_size = fiber.stack.size();
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  fiber.started = true;
  setcontext(&context);
}

void EmulatedCluster::turn(int thread) {
  Fiber& fiber = fibers_[thread];
  if (fiber.done || *fiber.waits_for) return;
  thread_ = thread;
  if (_setjmp(scheduler_) == 0) {
    if (fiber.started) _longjmp(fiber.place, 1);
    start(fiber);
  }
  if (error_) std::rethrow_exception(error_);
}

void EmulatedCluster::sync(const char* what, Scope scope) {
  Fiber& fiber = fibers_[thread_];
  fiber.waits_for = what, fiber.scope = scope;
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler_, 1);
}

float EmulatedCluster::remote(const float* mine, int block) {
  const auto offset = reinterpret_cast<const char*>(mine) - shared();
  if (fibers_[block * kThreads].done) throw std::logic_error("a remote read of a block that left");
  if (offset < 0 || offset + 4 > shared_bytes_) throw std::logic_error("a remote read outside");
  return *reinterpret_cast<const float*>(blocks_[block].data() + offset);
}

// Whether a warp goes on, having come to one instruction together; to different ones is an error.
bool EmulatedCluster::release_warp(int first) {
  const Fiber& leader = fibers_[first];
  for (int i = first; i < first + 32; ++i) {
    const Fiber& fiber = fibers_[i];
    if (std::strcmp(fiber.waits_for, leader.waits_for)) {
      throw std::logic_error("lanes of a warp are at '" + std::string(leader.waits_for) +
                             "' and '" + fiber.waits_for + "'");
    }
  }
  return leader.scope == Scope::kWarp && release(first, 32, Scope::kWarp);
}

// Threads that all wait for each other go on.
bool EmulatedCluster::release(int first, int count, Scope scope) {
  int waiting = 0, done = 0;
  for (int i = first; i < first + count; ++i) {
    waiting += fibers_[i].scope == scope, done += fibers_[i].done;
  }
  if (waiting && done) throw std::logic_error("threads have left that others wait for");
  if (waiting < count) return false;
  for (int i = first; i < first + count; ++i) {
    fibers_[i].waits_for = "", fibers_[i].scope = Scope::kNone;
  }
  return true;
}

void EmulatedCluster::require_shared(const void* at, int bytes) const {
  const char* begin = static_cast<const char*>(at);
  const char* shared = blocks_[block()].data();
  if (begin < shared || begin + bytes > shared + shared_bytes_ ||
      reinterpret_cast<uintptr_t>(at) % 16) {
    throw std::logic_error("16 bytes outside shared memory or not aligned");
  }
}

void EmulatedCluster::load(uint32_t (&to)[4], const void* row, bool transposed) {
  require_shared(row, 16);
  const int lane = thread() % 32;
  Exchange& warp = exchange();
  warp.row[lane] = row;
  sync(transposed ? "load_transposed" : "load_matrices", Scope::kWarp);
  for (int i = 0; i < 4; ++i) {
    uint32_t halves[2];
    for (int j = 0; j < 2; ++j) {
      const int across = lane % 4 * 2 + j, down = lane / 4;
      const void* from = warp.row[8 * i + (transposed ? across : down)];
      halves[j] = static_cast<const uint16_t*>(from)[transposed ? down : across];
    }
    to[i] = halves[0] | halves[1] << 16;
  }
  sync(transposed ? "load_transposed" : "load_matrices", Scope::kWarp);
}

void EmulatedCluster::land(const EmulatedCopy& copy) {
  if (copy.inside) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

void EmulatedCluster::copy(void* shared, const void* global, bool inside) {
  require_shared(shared, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16) throw std::logic_error("a copy is not aligned");
  fibers_[thread_].groups.back().push_back({shared, global, inside});
  if (!late_) land(fibers_[thread_].groups.back().back());
}

void EmulatedCluster::commit() { fibers_[thread_].groups.emplace_back(); }

// Lands all committed groups but the youngest `open`; the last group is not committed yet.
void EmulatedCluster::wait(int open) {
  auto& groups = fibers_[thread_].groups;
  while (static_cast<int>(groups.size()) > open + 1) {
    if (late_) {
      for (const EmulatedCopy& copy : groups.front()) land(copy);
    }
    groups.erase(groups.begin());
  }
}

EmulatedBarrier& EmulatedCluster::known(uint64_t* barrier) {
  const auto found = barriers_.find(barrier);
  if (found == barriers_.end()) throw std::logic_error("a barrier that nobody made");
  return found->second;
}

void EmulatedCluster::init_barrier(uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8) throw std::logic_error("a barrier not aligned");
  const char* at = reinterpret_cast<const char*>(barrier);
  const char* shared = blocks_[block()].data();
  if (at < shared || at + 8 > shared + shared_bytes_) {
    throw std::logic_error("a barrier outside shared memory");
  }
  barriers_[barrier] = {};
}

void EmulatedCluster::expect(uint64_t* barrier, int bytes) {
  EmulatedBarrier& seen = known(barrier);
  if (seen.arrived++) throw std::logic_error("a barrier was arrived at twice in a lap");
  seen.bytes += bytes;
}

// `late` copies land when they are waited for. What a thread wrote into their place must have been
// fenced: no run has copied without.
void EmulatedCluster::copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  require_shared(shared, bytes);
  if (bytes <= 0 || bytes % 16) throw std::logic_error("a bulk copy of other than 16 n bytes");
  if (reinterpret_cast<uintptr_t>(global) % 16) throw std::logic_error("a copy is not aligned");
  if (!fibers_[thread_].fenced) throw std::logic_error("a bulk copy before any fence");
  EmulatedBarrier& seen = known(barrier);
  seen.copies.push_back({shared, global, true, bytes});
  if (!late_) land(seen.copies.back());
}

// Where a warp waits together, it has issued all that can end the lap: it ends here or never.
void EmulatedCluster::wait_barrier(uint64_t* barrier, int lap) {
  sync("wait_barrier", Scope::kWarp);
  EmulatedBarrier& seen = known(barrier);
  if (seen.lap != lap) return;
  for (const EmulatedCopy& copy : seen.copies) {
    if (late_) land(copy);
    seen.bytes -= copy.bytes;
  }
  seen.copies.clear();
  if (seen.arrived != 1 || seen.bytes) {
    throw std::logic_error("a lap of a barrier that never ends: " + std::to_string(seen.bytes) +
                           " bytes are missing");
  }
  seen.arrived = 0, seen.lap ^= 1;
}

namespace {

// What the lanes of a warp bring to a product, until all have read it.
EmulatedCluster::Exchange& bring(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  EmulatedCluster::Exchange& warp = emulated->exchange();
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) warp.a[lane][i] = a[i];
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  emulated->sync("multiply", EmulatedCluster::Scope::kWarp);
  return warp;
}

double exact(uint32_t tf32) {
  if (tf32 & 0x1FFFu) throw std::logic_error("an operand of a TF32 product is not rounded to TF32");
  return float_of(tf32);
}

}  // namespace

template <>
void multiply<TFloat32>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const EmulatedCluster::Exchange& warp = bring(a, b0, b1);
  const int lane = thread_index() % 32, row = lane / 4;
  for (int i = 0; i < 4; ++i) {
    const int column = lane % 4 * 2 + i % 2;
    double total = 0;
    for (int k = 0; k < 8; ++k) {
      const uint32_t left = warp.a[row * 4 + k % 4][k / 4 * 2 + i / 2];
      total += exact(left) * exact(warp.b[column * 4 + k % 4][k / 4]);
    }
    sum[i] = static_cast<float>(sum[i] + total);
  }
  emulated->sync("multiply", EmulatedCluster::Scope::kWarp);
}

void multiply_as(float (&widen)(uint16_t), float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                 uint32_t b1) {
  const EmulatedCluster::Exchange& warp = bring(a, b0, b1);
  const int lane = thread_index() % 32, row = lane / 4;
  const auto element = [&](uint32_t word, int half) {
    return static_cast<double>(widen(static_cast<uint16_t>(word >> 16 * half)));
  };
  for (int i = 0; i < 4; ++i) {
    const int column = lane % 4 * 2 + i % 2;
    double total = 0;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = warp.a[row * 4 + k % 8 / 2][k / 8 * 2 + i / 2];
      const uint32_t right = warp.b[column * 4 + k % 8 / 2][k / 8];
      total += element(left, k % 2) * element(right, k % 2);
    }
    sum[i] = static_cast<float>(sum[i] + total);
  }
  emulated->sync("multiply", EmulatedCluster::Scope::kWarp);
}

}  // namespace fused_lora
