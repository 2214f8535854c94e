// GELU and its derivative in fp32, and pairs of 16 bits to take them of.
//
// erf   u Phi(u), erf by Abramowitz and Stegun 7.1.26, |error| <= 1.5e-7
//       grad  Phi(u) + u phi(u), which share one exponential
// tanh  u g, g = sigmoid(v), v = 2 sqrt(2 / pi) (u + 0.044715 u^3), or 0.5 (1 + tanh(v / 2))
//       grad  g + u g (1 - g) v'
#pragma once

#include <cmath>
#include <type_traits>

#include "common/dtype.h"

namespace fused_lora {

// 2^x and 1 / x, within a few units in the last place; what is too small for either is zero.
FL_DEVICE float quick_exp2(float x) {
#ifdef __CUDACC__
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
#else
  return std::exp2(x);
#endif
}

FL_DEVICE float quick_inverse(float x) {
#ifdef __CUDACC__
  float value;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
#else
  return 1.0f / x;
#endif
}

// u Phi(u) = max(u, 0) - |u| Phi(-|u|): one form for both signs. What lies beyond 1e18 is nothing,
// and stays a number times nothing where |u| is none.
FL_DEVICE float gelu_of(float u, float size, float beyond) {
  return std::fma(-std::fmin(size, 1e18f), beyond, std::fmax(u, 0.0f));
}

// What lies beyond |u|, over exp(-u^2 / 2): half of 7.1.26's coefficients.
FL_DEVICE float erf_tail(float size) {
  const float t = quick_inverse(std::fma(0.23164189f, size, 1.0f));
  return t * (0.127414796f +
              t * (-0.142248368f + t * (0.7107068705f + t * (-0.7265760135f + t * 0.5307027145f))));
}

FL_DEVICE float gelu_erf(float u) {
  const float size = std::fabs(u);
  return gelu_of(u, size, erf_tail(size) * quick_exp2(u * (-0.72134752f * u)));
}

FL_DEVICE float gelu_erf_grad(float u) {
  const float bell = quick_exp2(u * (-0.72134752f * u)), beyond = erf_tail(std::fabs(u)) * bell;
  return std::fma(0.3989422804f * u, bell, u >= 0.0f ? 1.0f - beyond : beyond);
}

// sigmoid(-|v|) by the exponential of -|v|, in powers of two.
FL_DEVICE float gelu_tanh(float u) {
  const float size = std::fabs(u);
  const float v = size * std::fma(u * u, -0.10294324f, -2.3022082f);
  const float tail = quick_exp2(v);
  return gelu_of(u, size, tail * quick_inverse(1.0f + tail));
}

// u is multiplied by nothing before u^2 may leave the range.
FL_DEVICE float gelu_tanh_grad(float u) {
  const float square = u * u;
  const float tail = quick_exp2(std::fabs(u) * std::fma(square, -0.10294324f, -2.3022082f));
  const float inside = quick_inverse(1.0f + tail), beyond = tail * inside;
  const float bend = std::fma(square, 0.2140644488f, 1.5957691216f);
  return std::fma(u * (inside * beyond), bend, u >= 0.0f ? inside : beyond);
}

template <Activation activation>
FL_DEVICE float activated(float u) {
  if constexpr (activation == Activation::kErf) return gelu_erf(u);
  if constexpr (activation == Activation::kTanh) return gelu_tanh(u);
  return u;
}

template <Activation activation>
FL_DEVICE float activation_grad(float u) {
  if constexpr (activation == Activation::kErf) return gelu_erf_grad(u);
  if constexpr (activation == Activation::kTanh) return gelu_tanh_grad(u);
  return 1.0f;
}

struct Pair {
  float at[2];
};

struct alignas(16) Four {
  float at[4];
};

// What nobody writes while a kernel runs.
template <typename T>
FL_DEVICE T read_only(const T* at) {
#ifdef __CUDACC__
  return __ldg(at);
#else
  return *at;
#endif
}

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

}  // namespace fused_lora
