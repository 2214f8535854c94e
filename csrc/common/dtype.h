// The element types of a tensor, and the way each goes to fp32 and back with one rounding.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/platform.h"

namespace fused_lora {

// The values of the `dtype` arguments of every op; Python reads them from the module.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

enum class Activation : int32_t { kNone = 0, kErf = 1, kTanh = 2 };  // GELU of either kind

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// fp32 as a product takes it: 10 bits of fraction, the lowest 13 bits zero.
struct TFloat32 {
  uint32_t bits;
};

FL_DEVICE uint32_t bits_of(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

FL_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

FL_DEVICE float widen(float x) { return x; }

FL_DEVICE float widen(TFloat32 x) { return float_of(x.bits); }

FL_DEVICE float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

FL_DEVICE float widen(Float16 x) {
#ifdef __CUDACC__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  // 2^112 moves the exponent from fp16's bias to fp32's, subnormals included, exactly.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFF) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  if (magnitude >= 0x0F800000u) return float_of(sign | magnitude | 0x7F800000u);  // inf, NaN
  return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
#endif
}

// Round to nearest, ties to even.
template <typename Out>
FL_DEVICE Out nearest(float x);

template <>
FL_DEVICE float nearest<float>(float x) {
  return x;
}

template <>
FL_DEVICE BFloat16 nearest<BFloat16>(float x) {
#ifdef __CUDACC__
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return {bits};
#else
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
FL_DEVICE Float16 nearest<Float16>(float x) {
#ifdef __CUDACC__
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return {bits};
#else
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {0x7FFF};
  if (magnitude >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // 65536 and up
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 lets fp32 round at fp16's 2^-24
    return {static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u))};
  }
  const uint32_t rebiased = magnitude - 0x38000000u;
  return {static_cast<uint16_t>(sign | ((rebiased + 0xFFFu + ((rebiased >> 13) & 1u)) >> 13))};
#endif
}

// Ties go away from zero: of this type the instruction has no other.
template <>
FL_DEVICE TFloat32 nearest<TFloat32>(float x) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return {bits};
#else
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {0x7FFFE000u};
  if (magnitude == 0x7F800000u) return {bits};
  return {(bits + 0x1000u) & ~0x1FFFu};
#endif
}

}  // namespace fused_lora
