// The two products of a tile as a warp forms them, one instruction deep: 32 bytes, which are 16
// elements of bf16 or fp16 and 8 of fp32, rounded to TF32 as they are read.
//
//            16 bits                                TF32
//   shrink   h [16 rows, 16 ranks] += z aT          hT [16 ranks, 8 rows] += a zT
//   expand   da [16 columns, 16 ranks] += zT dh     the same over 8 rows
//
// Lane l holds what its group g = l / 4 and place p = l % 4 name. ldmatrix hands out 16-bit pairs,
// or 32-bit words; only of pairs does it transpose. So TF32 expands from plain loads: place p takes
// rows 2 p and 2 p + 1 as depths p and p + 4, group g columns 2 g and 2 g + 1 as g and g + 8. Rows
// that are an odd number of 16 bytes long then meet every bank once, in both products.
#pragma once

#include "common/warp.h"
#include "lora_grad/fragments.h"

namespace fused_lora {

struct alignas(8) Two {
  float at[2];
};

template <typename T>  // of z, h and dh
struct Products {
  using Bits = uint16_t;
  static constexpr int kParts = 1;       // fragments of a strip and a block of ranks
  static constexpr int kShares = 2;      // sums of 16 x 8 that are a share of h
  static constexpr int kNextColumn = 8;  // from a lane's first column of a strip to its second
  static FL_DEVICE int column(int lane) { return lane / 4; }
  static FL_DEVICE Bits rounded(Bits bits) { return bits; }

  // z is the strip's corner of a tile, `to` the share's.
  static FL_DEVICE void load_rows(uint32_t (&to)[4], const Bits* z, int pitch, int lane) {
    load_matrices(to, z + lane % 16 * pitch + lane / 16 * 8);
  }

  static FL_DEVICE void load_columns(uint32_t (&to)[4], const Bits* z, int pitch, int lane) {
    load_transposed(to, z + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
  }

  // 16 ranks of h: two words for the first eight, two for the others.
  static FL_DEVICE void load_ranks(uint32_t (&to)[4], const Bits* h, int pitch, int lane) {
    load_transposed(to, h + lane % 16 * pitch + lane / 16 * 8);
  }

  static FL_DEVICE void shrink(float (&sum)[kShares][4], const uint32_t (&z)[4],
                               const Fragment (&f)[kParts]) {
    multiply<T>(sum[0], z, f[0].at[0], f[0].at[1]);
    multiply<T>(sum[1], z, f[0].at[2], f[0].at[3]);
  }

  static FL_DEVICE void put(float* to, const float (&sum)[kShares][4], int pitch, int lane) {
    to += lane / 4 * pitch + lane % 4 * 2;
    FL_UNROLL
    for (int j = 0; j < kShares; ++j) {
      *reinterpret_cast<Two*>(to + 8 * j) = {{sum[j][0], sum[j][1]}};
      *reinterpret_cast<Two*>(to + 8 * j + 8 * pitch) = {{sum[j][2], sum[j][3]}};
    }
  }
};

template <>
struct Products<TFloat32> {
  using Bits = uint32_t;
  static constexpr int kParts = 2, kShares = 1, kNextColumn = 1;
  static FL_DEVICE int column(int lane) { return lane / 4 * 2; }
  static FL_DEVICE Bits rounded(Bits bits) { return nearest<TFloat32>(float_of(bits)).bits; }

  static FL_DEVICE void load_rows(uint32_t (&to)[4], const Bits* z, int pitch, int lane) {
    load_matrices(to, z + lane % 8 * pitch + lane / 8 * 4);
    FL_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = rounded(to[i]);
  }

  static FL_DEVICE void load_columns(uint32_t (&to)[4], const Bits* z, int pitch, int lane) {
    FL_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Bits* row = z + (lane % 4 * 2 + i) * pitch + column(lane);
      const Two two = *reinterpret_cast<const Two*>(row);
      to[2 * i] = nearest<TFloat32>(two.at[0]).bits;
      to[2 * i + 1] = nearest<TFloat32>(two.at[1]).bits;
    }
  }

  // Rounded when they were put there.
  static FL_DEVICE void load_ranks(uint32_t (&to)[4], const Bits* h, int pitch, int lane) {
    FL_UNROLL
    for (int i = 0; i < 4; ++i) to[i] = h[(lane % 4 * 2 + i % 2) * pitch + lane / 4 + i / 2 * 8];
  }

  static FL_DEVICE void shrink(float (&sum)[kShares][4], const uint32_t (&z)[4],
                               const Fragment (&f)[kParts]) {
    multiply<TFloat32>(sum[0], f[0].at, z[0], z[1]);
    multiply<TFloat32>(sum[0], f[1].at, z[2], z[3]);
  }

  static FL_DEVICE void put(float* to, const float (&sum)[kShares][4], int pitch, int lane) {
    to += lane % 4 * 2 * pitch + lane / 4;
    FL_UNROLL
    for (int i = 0; i < 4; ++i) to[i % 2 * pitch + i / 2 * 8] = sum[0][i];
  }
};

}  // namespace fused_lora
