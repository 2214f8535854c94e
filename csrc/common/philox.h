// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011),
// and the one way this library spends its bits:
//
//   element e, a 64-bit index that the caller fixes, at (seed, step) owns 16 random bits:
//     block  = philox(counter = {e/8 low, e/8 high, step low, step high}, key = {seed low, high})
//     bits   = half (e mod 8) of the block: word (e mod 8)/2, its low half when e is even
//
// No tile, thread or launch shape enters, so no choice of them changes a result.
#pragma once

#include <cstdint>

#include "common/platform.h"

namespace fused_lora {

struct Noise {
  uint64_t seed;
  uint64_t step;
};

FL_DEVICE void philox(const uint32_t (&counter)[4], uint64_t seed, uint32_t (&out)[4]) {
  uint32_t x = counter[0], y = counter[1], z = counter[2], w = counter[3];
  uint32_t key_low = static_cast<uint32_t>(seed), key_high = static_cast<uint32_t>(seed >> 32);
  FL_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t from_x = static_cast<uint64_t>(0xD2511F53u) * x;
    const uint64_t from_z = static_cast<uint64_t>(0xCD9E8D57u) * z;
    x = static_cast<uint32_t>(from_z >> 32) ^ y ^ key_low;
    y = static_cast<uint32_t>(from_z);
    z = static_cast<uint32_t>(from_x >> 32) ^ w ^ key_high;
    w = static_cast<uint32_t>(from_x);
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  out[0] = x, out[1] = y, out[2] = z, out[3] = w;
}

// The bits of elements e, e + 1, ..., e + 7.
struct Random8 {
  uint32_t word[4];

  FL_DEVICE uint32_t half(int j) const { return (word[j / 2] >> (16 * (j & 1))) & 0xFFFFu; }
};

FL_DEVICE Random8 random8(int64_t e, Noise noise) {
  const uint64_t block = static_cast<uint64_t>(e) >> 3;
  uint32_t lane[8] = {};
  FL_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (i == 1 && (e & 7) == 0) break;  // aligned: one block holds all eight
    const uint64_t index = block + i;
    const uint32_t counter[4] = {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                                 static_cast<uint32_t>(noise.step),
                                 static_cast<uint32_t>(noise.step >> 32)};
    uint32_t word[4];
    philox(counter, noise.seed, word);
    FL_UNROLL
    for (int j = 0; j < 4; ++j) lane[4 * i + j] = word[j];
  }
  // Shift 256 bits right by 16 (e mod 8), one bit of e at a time: every index stays static.
  FL_UNROLL
  for (int i = 0; i < 6; ++i) lane[i] = (e & 4) ? lane[i + 2] : lane[i];
  FL_UNROLL
  for (int i = 0; i < 5; ++i) lane[i] = (e & 2) ? lane[i + 1] : lane[i];
  Random8 random;
  FL_UNROLL
  for (int i = 0; i < 4; ++i) {
    random.word[i] = (e & 1) ? (lane[i] >> 16) | (lane[i + 1] << 16) : lane[i];
  }
  return random;
}

}  // namespace fused_lora
