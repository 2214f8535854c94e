// How a block of lora_grad lies in shared memory, and the shapes it is compiled for.
//
//   barriers   per warp and stage  where bulk copies bring the tiles
//   tiles      per stage and warp  [rows, 16 S columns] of x or dy; a warp reads only its own
//   fragments  per warp            a or b as the matrix instruction takes them
//   sums       per warp            [rows, R] its share of h or dh, fp32
//   t          per parity          [rows, R] h and dh, rounded
//   shares     per parity          [rows, R] a block's share of h and dh, read by its cluster
//   totals     per warp            [16 S columns, R] its sums, read by a cluster of slices: at the
//                                  end, in the place of all but scales and barriers
//
// A tile has as many rows as an instruction is deep: 16 of bf16 or fp16, 8 of fp32, as many bytes.
// Rows are padded by 16 bytes, so that eight of them start in different banks.
#pragma once

#include "lora_grad/lora_grad.h"

namespace fused_lora {

constexpr int kGradWarps = 8;
constexpr int kGradThreads = 32 * kGradWarps;
constexpr int kLeastStages = 2, kMostStages = 4;

constexpr int smem_limit_bytes(int arch) {
  return arch == 80 || arch == 87        ? 163 << 10
         : arch == 90 || arch / 10 == 10 ? 227 << 10
                                         : 99 << 10;
}

// What a kernel is compiled for; an emulated block is one of sm_80.
#ifdef __CUDA_ARCH__
constexpr int kCompiledArch = __CUDA_ARCH__ / 10;
#else
constexpr int kCompiledArch = 80;
#endif

template <typename T,  // of products
          int S,       // strips per warp
          int RB,      // blocks of 16 ranks
          bool forms   // h or dh, from fragments of a and b
          >
struct GradLayout {
  static constexpr int kRanks = 16 * RB;
  static constexpr int kPiece = 16 / sizeof(T);             // elements of 16 bytes
  static constexpr int kRows = tile_rows(sizeof(T) == 4);   // of a tile; columns of a fragment
  static constexpr int kFragments = S * RB * (16 / kRows);  // of a warp
  static constexpr int kMostKept = sizeof(T) == 4 ? 24 : 12;
  static constexpr bool kKeeps = forms && kFragments <= kMostKept;            // in registers
  static constexpr int kSlots = kKeeps && kFragments > 12 ? 12 : kFragments;  // for them
  // Where sums take 144 registers or more, little else may live long.
  static constexpr bool kCrowded = forms && S * RB >= 18;
  static constexpr int kAtOnce = kCrowded ? 1 : RB;          // rank blocks
  static constexpr bool kLooksAhead = !kCrowded;             // for a given h and dh
  static constexpr int kBlocks = !forms && RB == 1 ? 2 : 1;  // that share a processor
  static constexpr int kTilePitch = 16 * S + kPiece;
  static constexpr int kTPitch = kRanks + kPiece, kSumPitch = kRanks + kPiece;
  static constexpr int kFragmentBytes = 512;  // of a warp's 32 lanes
  static constexpr int kWarpTileBytes = sizeof(T) * kRows * kTilePitch;
  static constexpr int kStageBytes = kGradWarps * kWarpTileBytes;

  static constexpr int kScales = 0;
  static constexpr int kBarriers = kScales + 4 * kMostRanks;
  static constexpr int kT = kBarriers + 8 * kGradWarps * kMostStages;
  static constexpr int kTBytes = sizeof(T) * kRows * kTPitch;  // of h, or of dh, at one parity
  static constexpr int kSums = kT + 4 * kTBytes;
  static constexpr int kWarpSumBytes = 4 * kRows * kSumPitch;
  static constexpr int kSlotsAt = kSums + (forms ? kGradWarps * kWarpSumBytes : 0);
  static constexpr int kAllSlotBytes = forms ? kGradWarps * kSlots * kFragmentBytes : 0;
  // What is kept in registers passes through the tiles' place before the first tile arrives, as
  // many at a time as there are slots.
  static constexpr int kTiles = kSlotsAt + (kKeeps ? 0 : kAllSlotBytes);

  static constexpr int kTotals = kT;
  static constexpr int kWarpTotalBytes = 4 * 16 * S * kRanks;
  static constexpr int kBytesOfTotals = kTotals + kGradWarps * kWarpTotalBytes;  // and before them

  static constexpr int kShareBytes = 4 * kRows * kRanks;  // of h, or of dh, at one parity
  static constexpr int kAllShareBytes = 4 * kShareBytes;  // lie last, and only in a cluster

  static_assert(kTilePitch / kPiece % 2 == 1 && kTPitch / kPiece % 2 == 1);  // banks
  static_assert(kFragments % kSlots == 0);
  static_assert(!kKeeps || kAllSlotBytes <= kLeastStages * kStageBytes);

  static constexpr int bytes(int stages, bool cluster = false) {
    return kTiles + stages * kStageBytes + (cluster ? kAllShareBytes : 0);
  }

  // Of a block beside the others of its processor.
  static constexpr int most_bytes(int limit_bytes) {
    return limit_bytes / kBlocks - (kBlocks > 1 ? 1024 : 0);
  }

  static constexpr int stages(int limit_bytes, bool cluster = false) {
    int found = kLeastStages;
    while (found < kMostStages && bytes(found + 1, cluster) <= most_bytes(limit_bytes)) ++found;
    return found;
  }

  static constexpr int kUsualStages = stages(smem_limit_bytes(kCompiledArch));
};

constexpr int most_cluster_blocks(int arch) { return arch >= 90 ? 8 : 1; }

// Where slices are in it, which need not be: beyond pairs, only where the chip has said how many
// such clusters it runs at once, or where others have measured it.
constexpr int most_slice_cluster_blocks(int arch, bool said) {
  return arch < 90 ? 1 : said || arch == 90 ? 8 : 2;
}

// Calls visit.operator()<T, S, RB, forms>() for each shape compiled for T, narrow before wide. Of
// TF32 there are fewer, since its fragments take twice the room.
template <typename T, typename Visit>
constexpr void each_grad_shape(Visit visit) {
  if constexpr (sizeof(T) == 4) {
    visit.template operator()<T, 6, 1, true>();
    visit.template operator()<T, 12, 1, true>();
    visit.template operator()<T, 6, 2, true>();
    visit.template operator()<T, 4, 4, true>();
    visit.template operator()<T, 6, 1, false>();
    visit.template operator()<T, 6, 2, false>();
    visit.template operator()<T, 4, 4, false>();
  } else {
    visit.template operator()<T, 6, 1, true>();
    visit.template operator()<T, 12, 1, true>();
    visit.template operator()<T, 16, 1, true>();
    visit.template operator()<T, 6, 2, true>();
    visit.template operator()<T, 12, 2, true>();
    visit.template operator()<T, 6, 3, true>();
    visit.template operator()<T, 4, 4, true>();
    visit.template operator()<T, 6, 4, true>();
    visit.template operator()<T, 6, 1, false>();
    visit.template operator()<T, 6, 2, false>();
    visit.template operator()<T, 4, 3, false>();
    visit.template operator()<T, 4, 4, false>();
  }
}

template <typename Visit>
constexpr void each_grad_shape(DType type, Visit visit) {
  switch (type) {
    case DType::kFloat32: return each_grad_shape<TFloat32>(visit);
    case DType::kBFloat16: return each_grad_shape<BFloat16>(visit);
    case DType::kFloat16: return each_grad_shape<Float16>(visit);
  }
}

}  // namespace fused_lora
