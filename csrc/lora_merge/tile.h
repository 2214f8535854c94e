// How the tiles of every item of a launch are numbered, and how one lies in shared memory and in
// the registers of a block.
#pragma once

#include "lora_merge/lora_merge.h"

namespace fused_lora {

constexpr int kRows = 64;
constexpr int kColumns = 128;
constexpr int kDepth = 16;
constexpr int kThreads = 256;
constexpr int kThreadRows = 4;
constexpr int kThreadColumns = 8;

struct alignas(16) MergeShared {
  float a[kDepth][144];        // a's chunk; columns lie as place_of says
  float b[kDepth][kRows + 4];  // b's chunk transposed, rows as row_place_of says
};

struct Accumulator {
  float at[kThreadRows][kThreadColumns];
};

struct MergeTile {
  const MergeItem* item;
  int row;     // first row of the tile
  int column;  // first column of the tile
};

// Eight columns are one thread's, read as two halves of four. All first halves lie side by side,
// then all second halves, 80 later: neither staging nor reading meets a bank twice.
FL_DEVICE int place_of(int column) {
  return (column / 8) * 4 + column % 4 + ((column & 4) ? 80 : 0);
}

// Depths lie four banks apart, so that the ninth meets the first: two neighbouring rows of the
// second eight change places with the next two. Four rows that are read at once stay together.
FL_DEVICE int row_place_of(int row, int depth) { return row ^ (depth & 8) / 4; }

FL_DEVICE int tiles_across(int k) { return (k - 1) / kColumns + 1; }

inline int64_t tiles_of(const MergeItem& item) {
  return static_cast<int64_t>((item.n - 1) / kRows + 1) * ((item.k - 1) / kColumns + 1);
}

// The last item whose first tile is not after `tile`.
FL_DEVICE MergeTile find_tile(const MergeItem* items, int count, int64_t tile) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (items[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int inside = static_cast<int>(tile - items[low].first_tile);
  const int across = tiles_across(items[low].k);
  return {items + low, inside / across * kRows, inside % across * kColumns};
}

}  // namespace fused_lora
