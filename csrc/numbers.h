// The types that value, points and weights may have, and their conversions, for host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "ms_deform_attn.h"
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace peft_d2 {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename To, typename From>
PEFT_D2_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Sums are kept in Accumulator<T>.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

PEFT_D2_INLINE float widen(float x) { return x; }
PEFT_D2_INLINE double widen(double x) { return x; }
PEFT_D2_INLINE float widen(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
PEFT_D2_INLINE float widen(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  // The exponent is re-biased by a multiplication, which also makes normal numbers of subnormal ones.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const float finite = bits_as<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN
  return bits_as<float>(bits_as<uint32_t>(finite) | special | uint32_t(x.bits & 0x8000u) << 16);
#endif
}

// Round to nearest, ties to even.
PEFT_D2_INLINE void narrow(float x, float& to) { to = x; }
PEFT_D2_INLINE void narrow(double x, double& to) { to = x; }
PEFT_D2_INLINE void narrow(float x, BFloat16& to) {
  const uint32_t bits = bits_as<uint32_t>(x);
  to.bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
PEFT_D2_INLINE void narrow(float x, Half& to) {
#if defined(__CUDA_ARCH__)
  to.bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above
  half = x != x ? 0x7e00u : half;
  to.bits = uint16_t(half | (bits >> 16 & 0x8000u));
#endif
}

template <typename T, typename C>
struct Pair {
  using Value = T;
  using Coordinate = C;
};

// Calls function(Pair<T, C>()).
template <typename Function>
void visit(Types types, Function function) {
  switch (types) {
    case Types::kDouble: return function(Pair<double, double>());
    case Types::kFloat: return function(Pair<float, float>());
    case Types::kBFloat16: return function(Pair<BFloat16, BFloat16>());
    case Types::kBFloat16Float: return function(Pair<BFloat16, float>());
    case Types::kHalf: return function(Pair<Half, Half>());
    case Types::kHalfFloat: return function(Pair<Half, float>());
  }
}

}  // namespace
}  // namespace peft_d2
