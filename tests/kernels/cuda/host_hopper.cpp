// The arithmetic of lora_linear, for tests; and small kernels that are right or wrong on purpose:
// what the emulated block must see.

#include <stdexcept>

#include "common/hopper.h"
#include "lora_linear_sm90/extended.h"

namespace fused_lora::sm90 {
namespace {

constexpr int kBytes = 64 << 10, kBarrier = 60 << 10;
constexpr uint16_t kOne = 0x3F80;  // of bfloat16

enum Flaw {
  kNoCopyWait = 1,
  kNoProductWait,
  kNoPublish,
  kNoMeeting,
  kNoFence,
  kNoBarrierPublished,
  kNotAligned,
  kOutside,
  kNoStoreWait,
  kFewBytes,
  kManyBytes,
  kDifferentProducts,
  kNotSwizzled,
};

// [64, 128] = [64, 16] [16, 128] of ones by the first warpgroup, and 16 columns of it stored.
struct Small {
  Flaw flaw;
  const TensorMap& in;
  const TensorMap& out;

  void operator()() const {
    const uint32_t first = (shared_address(emulated_blocks->shared()) + 1023) / 1024 * 1024;
    const uint32_t barrier = first + kBarrier;
    if (thread_index() == 0) {
      init_barrier(barrier, 1);
      if (flaw != kNoBarrierPublished) publish_barriers();
    }
    sync_block();
    if (thread_index() >= 128) return;
    if (thread_index() == 0) {
      const int bytes = 128 * kBoxRowBytes;
      arrive_expecting(barrier, bytes + (flaw == kManyBytes ? 16 : flaw == kFewBytes ? -16 : 0));
      load_box(first + (flaw == kNotAligned ? 16 : 0), in, 0, 0, barrier);
    }
    if (flaw != kNoCopyWait) wait_for(barrier, 0);
    float sum[64] = {};
    uint64_t left = by_rows(first, 0, 0);
    if (flaw == kOutside) left = by_rows(first + kBytes, 0, 0);
    if (flaw == kNotSwizzled) left &= ~(3ull << 62);
    if (flaw == kDifferentProducts && thread_index() == 77) left = by_rows(first, 8, 0);
    if (flaw != kNoFence) begin_products();
    multiply<BFloat16, false>(sum, left, by_rows(first, 0, 0), 0);
    commit_products();
    if (flaw != kNoProductWait) wait_products<0>();
    const uint32_t staged = first + (32 << 10);
    for (int i = 0; i < 4; ++i) stage(staged, sum, i);
    if (flaw != kNoPublish) publish_writes();
    if (flaw != kNoMeeting) sync_warpgroup(1);
    if (thread_index() == 0) {
      store_box(out, 0, 0, staged);
      commit_stores();
      if (flaw != kNoStoreWait) wait_stores_read();
    }
    wait_products<0>();
  }

  void stage(uint32_t staged, const float (&sum)[64], int i) const {
    uint32_t words[4];
    for (int j = 0; j < 4; ++j) {
      words[j] = nearest<BFloat16>(sum[8 * i + 2 * j]).bits;
      words[j] |= static_cast<uint32_t>(nearest<BFloat16>(sum[8 * i + 2 * j + 1]).bits) << 16;
    }
    const int lane = thread_index() % 32;
    const int row = thread_index() / 32 * 16 + lane % 16;
    store_matrices(staged_at(staged, row, 16 * i + lane / 16 * 8), words);
  }
};

enum ClusterFlaw {
  kHearsItself = 1,
  kNoRemoteArrive,
  kMaskOfItself,
  kMaskOfTheOther,
  kMaskBeyond,
  kHalfExpected,
  kNoStart,
  kNoEnd,
};

constexpr int kLaps = 5, kHalfRows = 8, kHalf = kHalfRows * kBoxRowBytes;

// Two blocks, each of which copies half of a stage to both, lap after lap, and the whole of it to
// its own part of `out`.
struct Pair {
  ClusterFlaw flaw;
  const TensorMap& in;
  const TensorMap& out;

  void operator()() const {
    const uint32_t first = (shared_address(emulated_blocks->shared()) + 1023) / 1024 * 1024;
    const uint32_t full = first + kBarrier, empty = full + 8;
    const int block = emulated_blocks->block();
    if (thread_index() == 0) {
      init_barrier(full, 1), init_barrier(empty, flaw == kHearsItself ? 1 : 2);
      publish_barriers();
    }
    sync_block();
    if (flaw != kNoStart) sync_cluster();
    for (int lap = 0; lap < kLaps; ++lap) {
      if (thread_index() == 0) fill(block, lap, first, full, empty);
      if (thread_index() == 128) read(block, lap, first, full, empty);
    }
    if (flaw != kNoEnd) sync_cluster();
  }

  void fill(int block, int lap, uint32_t first, uint32_t full, uint32_t empty) const {
    uint16_t mask = 3;
    if (flaw == kMaskOfItself) mask = 1 << block;
    if (flaw == kMaskOfTheOther) mask = 2 >> block;
    if (flaw == kMaskBeyond) mask = 7;
    wait_for(empty, lap % 2 ^ 1);
    arrive_expecting(full, flaw == kHalfExpected ? kHalf : 2 * kHalf);
    load_box_to(mask, first + block * kHalf, in, 0, (2 * lap + block) * kHalfRows, full);
  }

  void read(int block, int lap, uint32_t first, uint32_t full, uint32_t empty) const {
    wait_for(full, lap % 2);
    for (int half = 0; half < 2; ++half) {
      const int row = (2 * (block * kLaps + lap) + half) * kHalfRows;
      store_box(out, 0, row, first + half * kHalf);
    }
    commit_stores();
    wait_stores_read();
    const bool remote = flaw != kHearsItself && flaw != kNoRemoteArrive;
    for (int other = 0; other < 2; ++other) {
      if (other == block || remote) arrive_at(other, empty);
    }
  }
};

// How many elements of y = x wT + h bT, in ping-pong by one block, are not the sum; -1 where
// refused. Tiles of seven stages and of five are the consumers' by turns, in a ring of five.
int ping_pong_misses(bool backwards, bool late) {
  using Tile = LinearTile<64, 192, 1, true>;
  constexpr int kM = 130, kK = 296, kN = 392, kRank = 72, kOwned = 200;
  alignas(16) static uint16_t x[kM * kK], w[kN * kK], h[kM * kRank], b[kOwned * kRank];
  alignas(16) static uint16_t y[kM * kN];
  const uint16_t values[3] = {0, kOne, 0x8000 | kOne};
  uint32_t random = 1;
  const auto fill = [&](uint16_t* matrix, int count) {
    for (int i = 0; i < count; ++i) {
      random = random * 1664525 + 1013904223;
      matrix[i] = values[(random >> 16) % 3];
    }
  };
  fill(x, kM * kK), fill(w, kN * kK), fill(h, kM * kRank), fill(b, kOwned * kRank);
  for (uint16_t& element : y) element = 0xFFFF;
  const LinearShape shape = {kM, kN, kK, kRank, Right::kRows, Activation::kNone};
  const LinearPlan plan = {shape, 64, 192, 1, true, Tile::kStages, Tile::kBytes, 1, 9};
  LinearProblem problem = {};
  problem.x = {x, kK}, problem.w = {w, kK}, problem.y = {y, kN}, problem.groups = 1;
  problem.group[0] = {{h, kRank}, {b, kRank}, 0, kOwned, kRank, 0};
  LinearArguments arguments = {};
  if (make_arguments(problem, plan, &arguments)) return -2;
  try {
    EmulatedBlocks block(1, plan.smem_bytes, backwards, late);
    block.run([&] {
      using Kernel = Extended<BFloat16, Tile, Right::kRows, Activation::kNone>;
      Kernel(arguments, block.shared(), 0, 1).run();
    });
  } catch (const std::logic_error&) {
    return -1;
  }
  int misses = 0;
  const auto dot = [](const uint16_t* left, const uint16_t* right, int count) {
    float sum = 0;
    for (int i = 0; i < count; ++i) sum += widen(BFloat16{left[i]}) * widen(BFloat16{right[i]});
    return sum;
  };
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      float sum = dot(x + m * kK, w + n * kK, kK);
      if (n < kOwned) sum += dot(h + m * kRank, b + n * kRank, kRank);
      misses += y[m * kN + n] != nearest<BFloat16>(sum).bits;
    }
  }
  return misses;
}

}  // namespace
}  // namespace fused_lora::sm90

using namespace fused_lora::sm90;

extern "C" {

// How many of 64 x 64 elements are not 16; -1 where the emulation refuses the kernel.
int host_hopper_misses(int flaw, bool backwards, bool late) {
  alignas(16) static uint16_t in[128 * 64], out[64 * 64];
  for (uint16_t& element : in) element = kOne;
  for (uint16_t& element : out) element = 0xFFFF;
  TensorMap maps[2];
  const auto type = fused_lora::DType::kBFloat16;
  if (encode({in, type, 128, 64, 64, 128}, &maps[0])) return -2;
  if (encode({out, type, 64, 64, 64, 64}, &maps[1])) return -2;
  try {
    EmulatedBlocks block(1, kBytes, backwards, late);
    block.run(Small{static_cast<Flaw>(flaw), maps[0], maps[1]});
  } catch (const std::logic_error&) {
    return -1;
  }
  int misses = 0;
  for (const uint16_t element : out) misses += element != 0x4180;  // 16
  return misses;
}

// How many elements of what two blocks read of 2 kLaps boxes are not those; -1 likewise.
int host_cluster_misses(int flaw, bool backwards, bool late) {
  constexpr int kRows = 2 * kLaps * kHalfRows;
  alignas(16) static uint16_t in[kRows * 64], out[2 * kRows * 64];
  for (int i = 0; i < kRows * 64; ++i) in[i] = static_cast<uint16_t>(i);
  for (uint16_t& element : out) element = 0xFFFF;
  TensorMap maps[2];
  const auto type = fused_lora::DType::kBFloat16;
  if (encode({in, type, kRows, 64, 64, kHalfRows}, &maps[0])) return -2;
  if (encode({out, type, 2 * kRows, 64, 64, kHalfRows}, &maps[1])) return -2;
  try {
    EmulatedBlocks blocks(2, kBytes, backwards, late);
    blocks.run(Pair{static_cast<ClusterFlaw>(flaw), maps[0], maps[1]});
  } catch (const std::logic_error&) {
    return -1;
  }
  int misses = 0;
  for (int i = 0; i < 2 * kRows * 64; ++i) misses += out[i] != in[i % (kRows * 64)];
  return misses;
}

int host_ping_pong_misses(bool backwards, bool late) { return ping_pong_misses(backwards, late); }

void host_linear_corner(int64_t tile, int columns, int tile_rows, int tile_columns, int* corner) {
  const Corner c = corner_of(tile, columns, tile_rows, tile_columns);
  corner[0] = c.row, corner[1] = c.column;
}

bool host_linear_meets(int column, int tile_columns, int first, int count) {
  return meets(column, tile_columns, first, count);
}

int host_linear_products(int rank, int first) { return products_of(rank, first); }

uint32_t host_linear_staged(int row, int column) { return staged_at(0, row, column); }

uint64_t host_linear_descriptor(bool transposed, uint32_t stage, int first, int product) {
  return transposed ? by_columns(stage, first, product) : by_rows(stage, first, product);
}

}  // extern "C"
