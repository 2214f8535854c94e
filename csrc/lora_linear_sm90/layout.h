// How a block of lora_linear lies in shared memory, in which order it meets the tiles of y, and how
// products are told where their operands lie.
//
//   stages    [rows of x | columns of w] by 64 of the depth, rows of 128 bytes, swizzled
//   staged    per consumer, [64 rows, 64 columns] of y a box, swizzled; on the way to device memory
//   barriers  per stage, one for full and one for empty; in ping-pong one for each consumer's turn
//
// A consumer is a warpgroup. Two of them share a tile of 128 rows by rows, one of 64 by columns; in
// ping-pong, tiles of 64 rows are the one's and the other's by turns.
#pragma once

#include "common/tensor_map.h"
#include "lora_linear_sm90/lora_linear_sm90.h"

namespace fused_lora::sm90 {

constexpr int kLinearThreads = 384;  // the producer's warpgroup, then two consumers
constexpr int kConsumers = 2;
constexpr int kConsumerRows = 64;
constexpr int kDepth = 64;         // of a stage
constexpr int kProductDepth = 16;  // of one product
constexpr int kSmemLimitBytes = 227 << 10;
constexpr int kAlignment = 1024;  // eight rows of 128 bytes, where swizzles repeat
constexpr int kBoxBytes = kConsumerRows * kBoxRowBytes;

template <int Rows,               // of y in a tile
          int Columns,            // likewise
          int Cluster = 1,        // blocks that share w, their tiles one below the other
          bool PingPong = false>  // whether a tile is one consumer's, the next one the other's
struct LinearTile {
  static constexpr int kRows = Rows, kColumns = Columns, kCluster = Cluster;
  static constexpr bool kPingPong = PingPong;
  static constexpr bool kByColumns = Rows == kConsumerRows && !PingPong;
  static constexpr int kReaders = PingPong ? 1 : kConsumers;  // of a stage, in a block
  static constexpr int kConsumerColumns = kByColumns ? Columns / kConsumers : Columns;
  static constexpr int kConsumerBoxes = kConsumerColumns / kBoxColumns;
  static constexpr int kBoxesAtOnce = kConsumerBoxes > 3 ? 2 : kConsumerBoxes;  // staged

  static constexpr int kLeftBytes = Rows * kBoxRowBytes;
  static constexpr int kRightBytes = Columns * kBoxRowBytes;
  static constexpr int kStageBytes = kLeftBytes + kRightBytes;
  static constexpr int kStagedBytes = kConsumers * kBoxesAtOnce * kBoxBytes;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kFixedBytes = kAlignment + kStagedBytes + kBarrierBytes;
  static constexpr int kFitting = (kSmemLimitBytes - kFixedBytes) / kStageBytes;
  static constexpr int kStages = kFitting > 8 ? 8 : kFitting;
  static constexpr int kBytes = kFixedBytes + kStages * kStageBytes;

  // From the first multiple of kAlignment.
  static constexpr int kStaged = kStages * kStageBytes;
  static constexpr int kBarriers = kStaged + kStagedBytes;
  static constexpr int kTurns = kBarriers + 16 * kStages;

  static_assert(!PingPong || Rows == kConsumerRows);
  static_assert(kStages >= 3 && kBytes <= kSmemLimitBytes);
  static_assert(16 * kStages + 8 * kConsumers <= kBarrierBytes);
  static_assert(kDepth % (8 * kCluster) == 0 && kColumns % (8 * kCluster) == 0);  // whole swizzles
  static_assert(kConsumerColumns % kBoxColumns == 0 && kConsumerBoxes % kBoxesAtOnce == 0);

  static constexpr int first_row(int consumer) {
    return kByColumns || kPingPong ? 0 : kConsumerRows * consumer;
  }
  static constexpr int first_column(int consumer) {
    return kByColumns ? kConsumerColumns * consumer : 0;
  }
};

// Calls visit.operator()<Tile>() for each compiled tile.
template <typename Visit>
constexpr void each_linear_tile(Visit visit) {
  visit.template operator()<LinearTile<128, 128>>();
  visit.template operator()<LinearTile<128, 192>>();
  visit.template operator()<LinearTile<128, 256>>();
  visit.template operator()<LinearTile<64, 128>>();
  visit.template operator()<LinearTile<64, 256>>();
  visit.template operator()<LinearTile<128, 128, 2>>();
  visit.template operator()<LinearTile<128, 192, 2>>();
  visit.template operator()<LinearTile<128, 256, 2>>();
  visit.template operator()<LinearTile<64, 256, 1, true>>();
  visit.template operator()<LinearTile<64, 256, 2, true>>();
}

// Whether a plan is in this tile.
template <typename Tile>
constexpr bool has_tile(const LinearPlan& plan) {
  return plan.tile_rows == Tile::kRows && plan.tile_columns == Tile::kColumns &&
         plan.cluster == Tile::kCluster && plan.ping_pong == Tile::kPingPong;
}

// Where a tile begins. Columns change fastest: the tiles under way share rows of x, and w is small.
struct Corner {
  int32_t row, column;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr Corner corner_of(int64_t tile, int32_t columns, int tile_rows, int tile_columns) {
  const int64_t across = ceil_div(columns, tile_columns);
  return {static_cast<int32_t>(tile / across * tile_rows),
          static_cast<int32_t>(tile % across * tile_columns)};
}

// Whether a tile that begins at `column` has columns of [first, first + count).
constexpr bool meets(int column, int tile_columns, int first, int count) {
  return first < column + tile_columns && column < first + count;
}

// Products of 16 that a stage of the extension takes, where it begins at this rank.
constexpr int products_of(int rank, int first) {
  const int left = rank - first;
  return static_cast<int>(ceil_div(left < kDepth ? left : kDepth, kProductDepth));
}

// A matrix in shared memory as products read it, in rows of 128 swizzled bytes. `leading` and
// `stride` are bytes from one block of eight rows, or of 64 columns, to the next; see
// "matrix descriptor format" and "canonical layouts" of wgmma in the PTX manual:
//
//   depth contiguous  [rows, 64 deep]     stride from eight rows to the next; leading is not read
//   rows contiguous   [64 deep, 64 rows]  stride from a depth of eight to the next, leading from
//                                         64 rows to the next
constexpr uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kSwizzle128 = 1;
  const auto encoded = [](uint32_t bytes) { return static_cast<uint64_t>(bytes & 0x3FFFF) >> 4; };
  return encoded(address) | encoded(leading) << 16 | encoded(stride) << 32 | kSwizzle128 << 62;
}

constexpr int kEightRows = 8 * kBoxRowBytes;
constexpr int kDeepBoxBytes = kDepth * kBoxRowBytes;  // [64 deep, 64 rows]

// x, or w [N, K], from this row of the stage on, which begins at a multiple of eight rows.
constexpr uint64_t by_rows(uint32_t stage, int row, int product) {
  return descriptor(stage + row * kBoxRowBytes + product * 2 * kProductDepth, 16, kEightRows);
}

// w [K, N] from this column on, a multiple of 64: box after box of 64 columns.
constexpr uint64_t by_columns(uint32_t stage, int column, int product) {
  return descriptor(
      stage + column / kBoxColumns * kDeepBoxBytes + product * kProductDepth * kBoxRowBytes,
      kDeepBoxBytes, kEightRows);
}

// Where the eight columns from `column` on, of this row, are staged, in a consumer's part.
constexpr uint32_t staged_at(uint32_t staged, int row, int column) {
  return swizzled(staged + column / kBoxColumns * kBoxBytes + row * kBoxRowBytes +
                  column % kBoxColumns * 2);
}

}  // namespace fused_lora::sm90
