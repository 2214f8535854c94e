// How a block of lora_grad lies in shared memory, and the shapes it is compiled for.
//
//   barriers   per warp and stage  where bulk copies bring the tiles
//   tiles      per stage and warp  [16 rows, 16 S columns] of x or dy; a warp reads only its own
//   fragments  per warp            a or b as the matrix instruction takes them
//   sums       per warp            [16 rows, R] its share of h or dh, fp32
//   t          per parity          [16 rows, R] h and dh, rounded
//   shares     per parity          [16 rows, R] a block's share of h and dh, read by its cluster
//
// Rows are padded so that eight of them start in different banks.
#pragma once

#include "lora_grad/lora_grad.h"

namespace fused_lora {

constexpr int kGradWarps = 8;
constexpr int kGradThreads = 32 * kGradWarps;
constexpr int kTileRows = 16;
constexpr int kLeastStages = 2, kMostStages = 4;

template <int S,      // strips per warp
          int RB,     // blocks of 16 ranks
          bool forms  // h or dh, from fragments of a and b
          >
struct GradLayout {
  static constexpr int kRanks = 16 * RB;
  static constexpr bool kKeeps = forms && S * RB <= 12;  // fragments in registers
  // Where sums take 144 registers or more, little else may live long.
  static constexpr bool kCrowded = forms && S * RB >= 18;
  static constexpr int kAtOnce = kCrowded ? 1 : RB;          // rank blocks
  static constexpr bool kLooksAhead = !kCrowded;             // for a given h and dh
  static constexpr int kBlocks = !forms && RB == 1 ? 2 : 1;  // that share a processor
  static constexpr int kTilePitch = 16 * S + 8, kSumPitch = kRanks + 8, kTPitch = kRanks + 8;
  static constexpr int kFragmentBytes = 512;  // [16 columns, 16 ranks]
  static constexpr int kWarpTileBytes = 2 * kTileRows * kTilePitch;
  static constexpr int kStageBytes = kGradWarps * kWarpTileBytes;

  static constexpr int kScales = 0;
  static constexpr int kBarriers = kScales + 4 * kMostRanks;
  static constexpr int kT = kBarriers + 8 * kGradWarps * kMostStages;
  static constexpr int kTBytes = 2 * kTileRows * kTPitch;  // of h, or of dh, at one parity
  static constexpr int kSums = kT + 4 * kTBytes;
  static constexpr int kWarpSumBytes = 4 * kTileRows * kSumPitch;
  static constexpr int kFragments = kSums + (forms ? kGradWarps * kWarpSumBytes : 0);
  static constexpr int kAllFragmentBytes = forms ? kGradWarps * S * RB * kFragmentBytes : 0;
  // What is kept in registers passes through the tiles' place before the first tile arrives.
  static constexpr int kTiles = kFragments + (kKeeps ? 0 : kAllFragmentBytes);

  static constexpr int kShareBytes = 4 * kTileRows * kRanks;  // of h, or of dh, at one parity
  static constexpr int kAllShareBytes = 4 * kShareBytes;      // lie last, and only in a cluster

  static_assert(!kKeeps || kAllFragmentBytes <= kLeastStages * kStageBytes);

  static constexpr int bytes(int stages, bool cluster = false) {
    return kTiles + stages * kStageBytes + (cluster ? kAllShareBytes : 0);
  }
};

constexpr int most_cluster_blocks(int arch) { return arch >= 90 ? 8 : 1; }

constexpr int smem_limit_bytes(int arch) {
  return arch == 80 || arch == 87        ? 163 << 10
         : arch == 90 || arch / 10 == 10 ? 227 << 10
                                         : 99 << 10;
}

// Calls visit.operator()<S, RB, forms>() for each compiled shape, narrow before wide.
template <typename Visit>
constexpr void each_grad_shape(Visit visit) {
  visit.template operator()<6, 1, true>();
  visit.template operator()<12, 1, true>();
  visit.template operator()<16, 1, true>();
  visit.template operator()<6, 2, true>();
  visit.template operator()<12, 2, true>();
  visit.template operator()<6, 3, true>();
  visit.template operator()<4, 4, true>();
  visit.template operator()<6, 4, true>();
  visit.template operator()<6, 1, false>();
  visit.template operator()<6, 2, false>();
  visit.template operator()<4, 3, false>();
  visit.template operator()<4, 4, false>();
}

}  // namespace fused_lora
