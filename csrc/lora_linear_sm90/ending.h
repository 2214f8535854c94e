// What a sum passes through on its way to y; fp32, rounded by whoever stores it.
//
//   u = sum + bias      y = residual + factor act(u)
//
// erf   u Phi(u), erf by Abramowitz and Stegun 7.1.26, |error| <= 1.5e-7
// tanh  u g, g = sigmoid(2 sqrt(2 / pi) (u + 0.044715 u^3)) = 0.5 (1 + tanh(half of it))
#pragma once

#include <cmath>
#include <type_traits>

#include "lora_linear_sm90/arguments.h"

namespace fused_lora::sm90 {

FL_DEVICE float quick_exp(float x) {
#ifdef __CUDACC__
  return __expf(x);
#else
  return std::exp(x);
#endif
}

FL_DEVICE float quick_inverse(float x) {
#ifdef __CUDACC__
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}

FL_DEVICE float gelu_erf(float u) {
  const float z = std::fabs(u) * 0.7071067811865476f, t = quick_inverse(1.0f + 0.3275911f * z);
  // Half of 7.1.26's coefficients: p exp(-z^2) is what lies beyond |u|, on one side.
  const float p =
      t * (0.127414796f +
           t * (-0.142248368f + t * (0.7107068705f + t * (-0.7265760135f + t * 0.5307027145f))));
  const float beyond = p * quick_exp(-z * z);
  return u * (u >= 0.0f ? 1.0f - beyond : beyond);
}

FL_DEVICE float gelu_tanh(float u) {
  const float v = 1.5957691216057308f * (u + 0.044715f * u * u * u);
  const float tail = quick_exp(-std::fabs(v)), large = quick_inverse(1.0f + tail);
  return u * (v >= 0.0f ? large : tail * large);
}

template <Activation activation>
FL_DEVICE float activated(float u) {
  if constexpr (activation == Activation::kErf) return gelu_erf(u);
  if constexpr (activation == Activation::kTanh) return gelu_tanh(u);
  return u;
}

struct Pair {
  float at[2];
};

// Two neighbours of 16 bits, at a multiple of four bytes.
template <typename T>
FL_DEVICE Pair pair_of(const void* base, int64_t index) {
  const uint32_t both =
      *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(base) + index);
  return {{widen(T{static_cast<uint16_t>(both)}), widen(T{static_cast<uint16_t>(both >> 16)})}};
}

// Both rounded to nearest, the first in the lower half.
template <typename T>
FL_DEVICE uint32_t packed(Pair pair) {
#ifdef __CUDACC__
  uint32_t both;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(pair.at[1]), "f"(pair.at[0]));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(pair.at[1]), "f"(pair.at[0]));
  }
  return both;
#else
  return nearest<T>(pair.at[0]).bits | static_cast<uint32_t>(nearest<T>(pair.at[1]).bits) << 16;
#endif
}

}  // namespace fused_lora::sm90
