// Stochastic rounding: |x| lies t/65536 of the way from one number of the type to the next, t
// rounded down, and goes to the next one exactly when t + random >= 65536, random in [0, 65536).
// Infinity stands where the number after the largest would be; inf stays inf and NaN stays NaN.
#pragma once

#include "common/dtype.h"

namespace fused_lora {

template <typename Out>
FL_DEVICE Out stochastic(float x, uint32_t random);

// fp32 has nothing to round: the launcher refuses to be asked.
template <>
FL_DEVICE float stochastic<float>(float x, uint32_t) {
  return x;
}

template <>
FL_DEVICE BFloat16 stochastic<BFloat16>(float x, uint32_t random) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7F800000u) == 0x7F800000u) return nearest<BFloat16>(x);
  return {static_cast<uint16_t>((bits + random) >> 16)};
}

template <>
FL_DEVICE Float16 stochastic<Float16>(float x, uint32_t random) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
  if (magnitude >= 0x47800000u) return nearest<Float16>(x);  // 65536 and up, inf, NaN
  if (magnitude < 0x38800000u) {  // below 2^-14 the numbers of fp16 are 2^-24 apart
    const uint32_t fixed = static_cast<uint32_t>(float_of(magnitude) * 0x1p40f);
    return {static_cast<uint16_t>(sign | ((fixed + random) >> 16))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + (random >> 3)) >> 13))};
}

}  // namespace fused_lora
