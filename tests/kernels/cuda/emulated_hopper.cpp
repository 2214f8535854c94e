#include "emulated_hopper.h"

#include <ucontext.h>

#include <array>
#include <cstring>
#include <stdexcept>

namespace fused_lora::sm90 {

EmulatedBlocks* emulated_blocks = nullptr;

namespace {

constexpr int kStackBytes = 64 << 10;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::logic_error(what);
}

const MapShape& shape_of(const TensorMap& map) {
  return *reinterpret_cast<const MapShape*>(map.bytes);
}

// 128-byte swizzle: bits 4 to 6 of an address change by its bits 7 to 9.
uint32_t shuffled(uint32_t address) {
  const uint32_t piece = address / 16 % 8, row = address / 128 % 8;
  return address - 16 * piece + 16 * (piece ^ row);
}

// Calls visit(byte in the box, element of the matrix) for each element of a box that has one, and
// visit(byte, -1) for the others.
template <typename Visit>
void each_element(const MapShape& shape, int column, int row, Visit visit) {
  for (int r = 0; r < shape.box_rows; ++r) {
    for (int c = 0; c < kBoxColumns; ++c) {
      const int64_t m = static_cast<int64_t>(row) + r, n = static_cast<int64_t>(column) + c;
      const bool inside = m >= 0 && m < shape.rows && n >= 0 && n < shape.columns;
      visit(static_cast<uint32_t>(r * 128 + c * 2), inside ? m * shape.row + n : -1);
    }
  }
}

}  // namespace

// What the driver asks of a map; a CPU keeps the shape itself.
int encode(const MapShape& shape, TensorMap* map) {
  static_assert(sizeof(MapShape) <= sizeof(TensorMap));
  const bool sizes = shape.rows > 0 && shape.columns > 0 && shape.rows <= int64_t{1} << 32 &&
                     shape.columns <= int64_t{1} << 32;
  const bool box = shape.box_rows > 0 && shape.box_rows <= 256;
  const bool aligned = reinterpret_cast<uintptr_t>(shape.at) % 16 == 0 && shape.row % 8 == 0;
  if (!sizes || !box || !aligned || shape.row <= 0) return 1;
  std::memcpy(map->bytes, &shape, sizeof shape);
  return 0;
}

EmulatedBlocks::EmulatedBlocks(int blocks, int smem_bytes, bool backwards, bool late)
    : backwards_(backwards),
      late_(late),
      blocks_(blocks),
      fibers_(blocks * kThreads),
      warpgroups_(blocks * kThreads / 128) {
  require(smem_bytes <= 227 << 10, "more shared memory than there is");
  for (Block& block : blocks_) block.memory.resize(smem_bytes / 2);
  for (Fiber& fiber : fibers_) fiber.stack.resize(kStackBytes);
}

void EmulatedBlocks::run(const Work& body) {
  emulated_blocks = this;
  body_ = body;
  for (Block& block : blocks_) {
    block.memory.assign(block.memory.size(), 0xFFFF);
    block.barriers.clear(), block.published = false;
  }
  loads_.clear(), meetings_.clear();
  const int threads = static_cast<int>(fibers_.size());
  for (Warpgroup& warpgroup : warpgroups_) warpgroup = {};
  for (Fiber& fiber : fibers_) {
    fiber.started = fiber.done = fiber.fenced = false, fiber.holds = nullptr;
  }
  for (bool busy = true; busy;) {
    bool moved = busy = false;
    for (int i = 0; i < threads; i += 32) moved |= run_warp(backwards_ ? threads - 32 - i : i);
    for (const Fiber& fiber : fibers_) busy |= !fiber.done;
    if (moved || land() || !busy) continue;
    std::string who;
    for (int i = 0; i < threads; i += 32) who += std::string(" ") + fibers_[i].waits_for;
    throw std::logic_error("nothing moves; warps wait in" + who);
  }
  require(loads_.empty(), "the block ends before its copies");
  for (const Fiber& fiber : fibers_) {
    require(fiber.open_stores.empty() && fiber.stores.empty(),
            "a thread ends before its stores have read");
  }
  for (const Block& block : blocks_) {
    for (const auto& [at, barrier] : block.barriers) {
      require(barrier.bytes == 0, "a barrier ends with bytes announced or brought too many");
    }
  }
}

// As far as it gets without other warps: no kernel may count on them being as far.
bool EmulatedBlocks::run_warp(int first) {
  bool any = false;
  for (bool moved = true; moved; any |= moved) {
    moved = false;
    for (int i = 0; i < 32; ++i) moved |= turn(backwards_ ? first + 31 - i : first + i);
  }
  return any;
}

// One copy that nobody may count on before: the youngest.
bool EmulatedBlocks::land() {
  if (loads_.empty()) return false;
  const Work load = loads_.back();
  loads_.pop_back();
  load();
  return true;
}

void EmulatedBlocks::enter() {
  const int thread = emulated_blocks->thread_;
  try {
    emulated_blocks->body_();
  } catch (...) {
    emulated_blocks->error_ = std::current_exception();
  }
  emulated_blocks->fibers_[thread].done = true;
  _longjmp(emulated_blocks->scheduler_, 1);
}

// A context is made once; from then on fibers jump, which takes no system call.
void EmulatedBlocks::start(Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.data();
  context.uc_stack.ss_size = fiber.stack.size();
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  fiber.started = true;
  setcontext(&context);
}

// Whether the thread could go on.
bool EmulatedBlocks::turn(int thread) {
  Fiber& fiber = fibers_[thread];
  if (fiber.done || (fiber.holds && !fiber.holds())) return false;
  fiber.holds = nullptr, fiber.waits_for = "";
  thread_ = thread;
  if (_setjmp(scheduler_) == 0) {
    if (fiber.started) _longjmp(fiber.place, 1);
    start(fiber);
  }
  if (error_) std::rethrow_exception(error_);
  return true;
}

void EmulatedBlocks::until(const std::function<bool()>& holds, const char* what) {
  if (holds()) return;
  Fiber& fiber = me();
  fiber.holds = holds, fiber.waits_for = what;
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler_, 1);
}

void EmulatedBlocks::meet(int count, const char* what) {
  Meeting& meeting = meetings_[1000 * (thread_ / count * count) + count];
  const int round = meeting.round;
  if (++meeting.waiting == count) meeting.waiting = 0, ++meeting.round;
  until([&meeting, round] { return meeting.round != round; }, what);
}

void EmulatedBlocks::meet_all(const char* what) { meet(static_cast<int>(fibers_.size()), what); }

void EmulatedBlocks::init_barrier(uint32_t at, int arrivals) {
  auto& barriers = blocks_[block()].barriers;
  require(at % 8 == 0 && !barriers.count(at), "a barrier is not aligned, or is there already");
  element(block(), at), element(block(), at + 6);
  barriers[at] = {arrivals, arrivals};
}

void EmulatedBlocks::publish_barriers() { blocks_[block()].published = true; }

// Whether all threads of a block have ended: its shared memory may be another's by now.
bool EmulatedBlocks::gone(int block) const {
  for (int i = 0; i < kThreads; ++i) {
    if (!fibers_[block * kThreads + i].done) return false;
  }
  return true;
}

EmulatedBlocks::Barrier& EmulatedBlocks::barrier(int block, uint32_t at) {
  require(block >= 0 && block < static_cast<int>(blocks_.size()), "no such block in the cluster");
  require(!gone(block), "the block has ended");
  Block& its = blocks_[block];
  require(its.published && its.barriers.count(at), "no barrier here, or not published");
  return its.barriers[at];
}

void EmulatedBlocks::settle(Barrier& barrier) {
  require(barrier.missing >= 0, "more arrivals than a barrier expects");
  if (barrier.missing || barrier.bytes) return;
  barrier.missing = barrier.arrivals;
  barrier.phase ^= 1;
}

void EmulatedBlocks::arrive(uint32_t at, int bytes) {
  Barrier& here = barrier(block(), at);
  here.bytes += bytes, --here.missing;
  settle(here);
}

void EmulatedBlocks::arrive_at(int block, uint32_t at) {
  Barrier& there = barrier(block, at);
  --there.missing;
  settle(there);
}

void EmulatedBlocks::wait_for(uint32_t at, uint32_t parity) {
  Barrier& here = barrier(block(), at);
  until([&here, parity] { return here.phase != parity; }, "wait_for");
}

uint16_t& EmulatedBlocks::element(int block, uint32_t address) {
  std::vector<uint16_t>& memory = blocks_[block].memory;
  require(address >= kFirst && (address - kFirst) / 2 < memory.size() && address % 2 == 0,
          "outside shared memory: " + std::to_string(address));
  return memory[(address - kFirst) / 2];
}

void EmulatedBlocks::load_box(uint32_t blocks, uint32_t to, const TensorMap& map, int column,
                              int row, uint32_t barrier_at) {
  require(to % 128 == 0, "a box is not aligned");
  require(blocks >> blocks_.size() == 0, "a copy to a block that is not in the cluster");
  const MapShape shape = shape_of(map);
  for (int block = 0; block < static_cast<int>(blocks_.size()); ++block) {
    if (!(blocks >> block & 1)) continue;
    barrier(block, barrier_at);
    const Work work = [=] {
      Barrier& full = barrier(block, barrier_at);
      const uint16_t* matrix = static_cast<const uint16_t*>(shape.at);
      each_element(shape, column, row, [&](uint32_t byte, int64_t at) {
        element(block, shuffled(to + byte)) = at < 0 ? 0 : matrix[at];
      });
      full.bytes -= shape.box_rows * 128;
      settle(full);
    };
    if (late_) {
      loads_.push_back(work);
    } else {
      work();
    }
  }
}

void EmulatedBlocks::store_box(const TensorMap& map, int column, int row, uint32_t from) {
  require(from % 128 == 0, "a box is not aligned");
  const MapShape shape = shape_of(map);
  const Work work = [=, block = block()] {
    uint16_t* matrix = static_cast<uint16_t*>(const_cast<void*>(shape.at));
    each_element(shape, column, row, [&](uint32_t byte, int64_t at) {
      const uint16_t value = element(block, shuffled(from + byte));
      if (at >= 0) matrix[at] = value;
    });
  };
  me().open_stores.push_back(work);
  if (!late_) work();
}

void EmulatedBlocks::commit_stores() {
  auto& open = me().open_stores;
  me().stores.insert(me().stores.end(), open.begin(), open.end());
  open.clear();
}

void EmulatedBlocks::wait_stores_read() {
  for (const Work& store : me().stores) {
    if (late_) store();
  }
  me().stores.clear();
}

// Lands where the copy engine sees it once it is published.
void EmulatedBlocks::store_matrices(uint32_t row, const uint32_t (&from)[4]) {
  require(row % 16 == 0, "a row of a matrix is not aligned");
  static std::vector<std::array<uint32_t, 4>> words;
  words.resize(fibers_.size());
  const int first = thread_ / 32 * 32, lane = thread_ % 32;
  std::memcpy(words[thread_].data(), from, sizeof words[0]);
  meet(32, "store_matrices");
  uint16_t values[8];  // of the row that this lane points at
  for (int i = 0; i < 8; ++i) {
    values[i] = static_cast<uint16_t>(words[first + lane % 8 * 4 + i / 2][lane / 8] >> i % 2 * 16);
  }
  std::vector<uint16_t> landed(values, values + 8);
  const auto work = [this, row, landed, block = block()] {
    for (int i = 0; i < 8; ++i) element(block, row + 2 * i) = landed[i];
  };
  me().writes.push_back(work);
  meet(32, "store_matrices");
}

void EmulatedBlocks::publish_writes() {
  for (const Work& write : me().writes) write();
  me().writes.clear();
}

void EmulatedBlocks::begin_products() { me().fenced = true; }

// The element of a matrix that a descriptor means; see "canonical layouts" in the PTX manual.
uint16_t EmulatedBlocks::operand(int block, uint64_t descriptor, int row, int depth,
                                 bool transposed) {
  const auto field = [=](int first) {
    return static_cast<uint32_t>(descriptor >> first & 0x3FFF) << 4;
  };
  const uint64_t known = 0x3FFFull | 0x3FFFull << 16 | 0x3FFFull << 32 | 3ull << 62;
  require((descriptor & ~known) == 0 && descriptor >> 62 == 1, "not a 128-byte swizzle from 0");
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  if (transposed) {
    return element(block, shuffled(start + row % 64 * 2 + row / 64 * leading + depth % 8 * 128 +
                                   depth / 8 * stride));
  }
  return element(block, shuffled(start + row % 8 * 128 + row / 8 * stride + depth * 2));
}

void EmulatedBlocks::compute(const Product& p) {
  const int columns = 2 * p.count;
  std::vector<double> left(64 * 16), right(columns * 16);
  for (int i = 0; i < 64 * 16; ++i) {
    left[i] = p.widen(operand(p.block, p.left, i / 16, i % 16, false));
  }
  for (int i = 0; i < columns * 16; ++i) {
    right[i] = p.widen(operand(p.block, p.right, i / 16, i % 16, p.transposed));
  }
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < p.count; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8;
      const int column = i / 4 * 8 + t % 4 * 2 + i % 2;
      double total = p.add ? p.sum[t][i] : 0.0;
      for (int k = 0; k < 16; ++k) total += left[16 * row + k] * right[16 * column + k];
      p.sum[t][i] = static_cast<float>(total);
    }
  }
}

void EmulatedBlocks::multiply(float* sum, int count, uint64_t left, uint64_t right, bool transposed,
                              bool add, Widen widen) {
  require(me().fenced, "a product that no fence came before");
  Warpgroup& group = warpgroup();
  if (group.issued == 0) {
    group.next = {left, right, transposed, add, count, widen, block(), {}};
  }
  const Product& p = group.next;
  require(p.left == left && p.right == right && p.add == add && p.count == count,
          "threads of a warpgroup ask for different products");
  group.next.sum[thread_ % 128] = sum;
  ++group.issued;
  meet(128, "multiply");
  if (group.issued == 128) {
    group.issued = 0;
    if (late_) {
      group.open.push_back(group.next);
    } else {
      compute(group.next);
    }
  }
  meet(128, "multiply");
}

void EmulatedBlocks::commit_products() {
  Warpgroup& group = warpgroup();
  meet(128, "commit_products");
  if (++group.committed < 128) return;
  group.committed = 0;
  group.groups.push_back(group.open);
  group.open.clear();
}

void EmulatedBlocks::wait_products(size_t open) {
  Warpgroup& group = warpgroup();
  me().fenced = false;  // sums may be read and written now
  meet(128, "wait_products");
  while (group.groups.size() > open) {
    for (const Product& product : group.groups.front()) compute(product);
    group.groups.erase(group.groups.begin());
  }
}

}  // namespace fused_lora::sm90
