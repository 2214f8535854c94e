// The launch of lora_merge.cu on a CPU: the same tile code, its threads in a loop, over shared
// memory that starts as NaN. Linked with lora_merge.cpp and bindings.cpp it is a whole module, and
// the functions at the end show its parts to ctypes.

#include <cstring>

#include "common/error.h"
#include "lora_merge/phases.h"

namespace fused_lora {
namespace {

struct HostBlock {
  MergeShared shared;
  Accumulator sums[kThreads];

  HostBlock() {
    std::memset(&shared, 0xFF, sizeof shared);
    std::memset(sums, 0xFF, sizeof sums);
  }

  template <typename Phase>
  void each_thread(Phase phase) {
    // From the last thread to the first: an order no thread may rely on.
    for (int thread = kThreads - 1; thread >= 0; --thread) phase(thread, sums[thread]);
  }
};

template <typename W, typename Out>
void run(const MergeItem* items, int count, int64_t tiles, DType adapter, Rounding rounding,
         Noise noise) {
  for (int64_t tile = 0; tile < tiles; ++tile) {
    HostBlock block;
    const MergeTile at = find_tile(items, count, tile);
    if (rounding == Rounding::kNearest) {
      merge_tile<W, Out, Rounding::kNearest>(block, at, adapter, noise);
    } else {
      merge_tile<W, Out, Rounding::kStochastic>(block, at, adapter, noise);
    }
  }
}

}  // namespace

int launch_lora_merge(const MergeItem* table, int32_t count, int64_t tiles, MergeTypes types,
                      Rounding rounding, Noise noise, int device, void*) {
  if (device < 0) return 101;
  const bool wide = types.w == DType::kFloat32;
  const auto launch = types.out == DType::kFloat32 ? run<float, float>
                      : types.out == DType::kBFloat16
                          ? (wide ? run<float, BFloat16> : run<BFloat16, BFloat16>)
                          : (wide ? run<float, Float16> : run<Float16, Float16>);
  launch(table, count, tiles, types.adapter, rounding, noise);
  return 0;
}

const char* cuda_error_text(int) { return "invalid device ordinal"; }

}  // namespace fused_lora

using namespace fused_lora;

extern "C" {

void host_philox(const uint32_t* counter, uint64_t seed, uint32_t* out) {
  uint32_t in[4], words[4];
  std::memcpy(in, counter, sizeof in);
  philox(in, seed, words);
  std::memcpy(out, words, sizeof words);
}

void host_random8(int64_t e, uint64_t seed, uint64_t step, int64_t* out) {
  const Random8 random = random8(e, {seed, step});
  for (int j = 0; j < 8; ++j) out[j] = random.half(j);
}

void host_widen(const uint16_t* bits, int64_t count, bool bf16, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = bf16 ? widen(BFloat16{bits[i]}) : widen(Float16{bits[i]});
  }
}

void host_nearest(const float* x, int64_t count, bool bf16, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = bf16 ? nearest<BFloat16>(x[i]).bits : nearest<Float16>(x[i]).bits;
  }
}

void host_nearest_tf32(const float* x, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = nearest<TFloat32>(x[i]).bits;
}

void host_stochastic(const float* x, const int64_t* random, int64_t count, bool bf16,
                     uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random[i]);
    out[i] = bf16 ? stochastic<BFloat16>(x[i], bits).bits : stochastic<Float16>(x[i], bits).bits;
  }
}

// Of each tile: the item's place in the table, first row, first column.
void host_tiles(const void* table, int32_t count, int64_t tiles, int64_t* out) {
  const auto* items = static_cast<const MergeItem*>(table);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const MergeTile at = find_tile(items, count, tile);
    *out++ = at.item - items, *out++ = at.row, *out++ = at.column;
  }
}

}  // extern "C"
