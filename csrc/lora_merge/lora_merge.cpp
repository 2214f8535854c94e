#include "lora_merge/lora_merge.h"

#include <limits>
#include <stdexcept>

#include "common/error.h"
#include "lora_merge/tile.h"

namespace fused_lora {
namespace {

void require(bool holds, size_t index, const std::string& what) {
  if (!holds) {
    throw std::invalid_argument("lora_merge: item " + std::to_string(index) + ": " + what);
  }
}

void check(const MergeItem& item, size_t index) {
  require(item.n > 0 && item.k > 0 && item.r >= 0, index,
          "n and k must be positive and r not negative, got n=" + std::to_string(item.n) +
              " k=" + std::to_string(item.k) + " r=" + std::to_string(item.r));
  require(item.w && item.out, index, "w and out must not be null");
  require(item.r == 0 || (item.a && item.b), index, "a and b must not be null when r > 0");
  require(item.offset >= 0, index, "offset must not be negative");
  require(item.n == 1 || item.out_row >= item.k, index, "rows of out overlap");
  require(item.out != item.w || item.out_row == item.w_row, index,
          "in place, w and out must have the same row stride");
}

int64_t size_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

bool moves_in_16_bytes(const void* base, int64_t row, DType dtype) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && row * size_bytes(dtype) % 16 == 0;
}

}  // namespace

PackedMerge pack_merge_items(std::vector<MergeItem> items, MergeTypes types) {
  int64_t tiles = 0;
  for (size_t index = 0; index < items.size(); ++index) {
    MergeItem& item = items[index];
    check(item, index);
    item.first_tile = tiles;
    item.vectorised = moves_in_16_bytes(item.w, item.w_row, types.w) &&
                      moves_in_16_bytes(item.out, item.out_row, types.out);
    tiles += tiles_of(item);
    require(tiles <= std::numeric_limits<int32_t>::max(), index, "too many tiles for one launch");
  }
  return {
      std::string(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(MergeItem)),
      tiles};
}

void lora_merge(const void* table, int32_t count, int64_t tiles, MergeTypes types,
                Rounding rounding, Noise noise, int device, void* stream) {
  if (tiles == 0) return;
  const bool served = types.w == types.out || types.w == DType::kFloat32;
  if (!served) throw std::invalid_argument("lora_merge: out must have w's dtype, or w be float32");
  if (rounding == Rounding::kStochastic && types.out == DType::kFloat32) {
    throw std::invalid_argument("lora_merge: a float32 out has nothing to round stochastically");
  }
  const int error = launch_lora_merge(static_cast<const MergeItem*>(table), count, tiles, types,
                                      rounding, noise, device, stream);
  if (error) throw std::runtime_error(std::string("lora_merge: ") + cuda_error_text(error));
}

}  // namespace fused_lora
