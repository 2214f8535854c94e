// What one block of lora_merge does to one tile of w', written over a `Block` that runs a phase
// for each of its threads and then waits for all: threads and a barrier on a device, a loop in a
// test on a CPU.
//
//            kColumns = 128                 256 threads, 16 x 16; each owns 4 rows x 8 columns.
//          +----------------+               Per chunk of kDepth ranks:
//   kRows  |  tile of w'    |                 stage       a and b to shared memory, as fp32
//     64   |                |                 accumulate  4 x 8 products per rank, in registers
//          +----------------+               At last  finish: w' = round(w + s acc), once.
#pragma once

#include <cmath>

#include "common/stochastic.h"
#include "lora_merge/tile.h"

namespace fused_lora {

template <typename T>
struct alignas(16) Eight {
  T at[8];
};

struct alignas(16) Four {
  float at[4];
};

// Neighbouring threads read neighbouring columns of a and neighbouring ranks of b. What lies
// outside is zero and adds nothing.
template <typename A>
FL_DEVICE void stage_as(int thread, MergeTile tile, int rank, MergeShared& shared) {
  const MergeItem& item = *tile.item;
  const A* a = static_cast<const A*>(item.a);
  const A* b = static_cast<const A*>(item.b);
  FL_UNROLL
  for (int i = 0; i < kDepth * kColumns / kThreads; ++i) {
    const int column = thread % kColumns, depth = thread / kColumns + i * (kThreads / kColumns);
    const int64_t r = rank + depth, k = tile.column + column;
    const bool inside = r < item.r && k < item.k;
    shared.a[depth][place_of(column)] = inside ? widen(a[r * item.a_r + k * item.a_k]) : 0.0f;
  }
  FL_UNROLL
  for (int i = 0; i < kDepth * kRows / kThreads; ++i) {
    const int depth = thread % kDepth, row = thread / kDepth + i * (kThreads / kDepth);
    const int64_t r = rank + depth, n = tile.row + row;
    const bool inside = r < item.r && n < item.n;
    shared.b[depth][row_place_of(row, depth)] =
        inside ? widen(b[n * item.b_n + r * item.b_r]) : 0.0f;
  }
}

FL_DEVICE void stage(int thread, MergeTile tile, int rank, DType adapter, MergeShared& shared) {
  switch (adapter) {
    case DType::kFloat32: return stage_as<float>(thread, tile, rank, shared);
    case DType::kBFloat16: return stage_as<BFloat16>(thread, tile, rank, shared);
    case DType::kFloat16: return stage_as<Float16>(thread, tile, rank, shared);
  }
}

FL_DEVICE void accumulate(int thread, const MergeShared& shared, Accumulator& sum) {
  const int across = thread % 16 * 4, down = thread / 16 * kThreadRows;
  FL_UNROLL
  for (int r = 0; r < kDepth; ++r) {
    const Four first = *reinterpret_cast<const Four*>(&shared.a[r][across]);
    const Four second = *reinterpret_cast<const Four*>(&shared.a[r][across + 80]);
    const Four b = *reinterpret_cast<const Four*>(&shared.b[r][down]);
    FL_UNROLL
    for (int i = 0; i < kThreadRows; ++i) {
      FL_UNROLL
      for (int j = 0; j < 4; ++j) {
        sum.at[i][j] = fmaf(b.at[row_place_of(i, r)], first.at[j], sum.at[i][j]);
        sum.at[i][j + 4] = fmaf(b.at[row_place_of(i, r)], second.at[j], sum.at[i][j + 4]);
      }
    }
  }
}

// Eight neighbouring elements of w' from eight of w and their products; `width` of them exist.
template <typename W, typename Out, Rounding rounding>
FL_DEVICE void finish_eight(const W* w, Out* out, const float (&sum)[8], const MergeItem& item,
                            int width, int64_t e, Noise noise) {
  const bool whole = width >= 8 && item.vectorised;
  Eight<W> wide = {};
  if (whole) wide = *reinterpret_cast<const Eight<W>*>(w);
  Random8 random = {};
  if constexpr (rounding == Rounding::kStochastic) random = random8(e, noise);
  Eight<Out> rounded;
  FL_UNROLL
  for (int j = 0; j < 8; ++j) {
    if (!whole && j < width) wide.at[j] = w[j];
    const float merged = fmaf(item.scale, sum[j], widen(wide.at[j]));
    if constexpr (rounding == Rounding::kStochastic) {
      rounded.at[j] = stochastic<Out>(merged, random.half(j));
    } else {
      rounded.at[j] = nearest<Out>(merged);
    }
    if (!whole && j < width) out[j] = rounded.at[j];
  }
  if (whole) *reinterpret_cast<Eight<Out>*>(out) = rounded;
}

template <typename W, typename Out, Rounding rounding>
FL_DEVICE void finish(int thread, MergeTile tile, const Accumulator& sum, Noise noise) {
  const MergeItem& item = *tile.item;
  const int64_t k = tile.column + thread % 16 * kThreadColumns;
  const int width = item.k - static_cast<int>(k);
  FL_UNROLL
  for (int i = 0; i < kThreadRows; ++i) {
    const int64_t n = tile.row + thread / 16 * kThreadRows + i;
    if (n >= item.n || width <= 0) continue;
    finish_eight<W, Out, rounding>(static_cast<const W*>(item.w) + n * item.w_row + k,
                                   static_cast<Out*>(item.out) + n * item.out_row + k, sum.at[i],
                                   item, width, item.offset + n * item.k + k, noise);
  }
}

template <typename W, typename Out, Rounding rounding, typename Block>
FL_DEVICE void merge_tile(Block& block, MergeTile tile, DType adapter, Noise noise) {
  block.each_thread([&](int, Accumulator& sum) { sum = {}; });
  for (int rank = 0; rank < tile.item->r; rank += kDepth) {
    block.each_thread(
        [&](int thread, Accumulator&) { stage(thread, tile, rank, adapter, block.shared); });
    block.each_thread([&](int thread, Accumulator& sum) { accumulate(thread, block.shared, sum); });
  }
  block.each_thread(
      [&](int thread, Accumulator& sum) { finish<W, Out, rounding>(thread, tile, sum, noise); });
}

}  // namespace fused_lora
