// Registers of numbers. One definition serves every instruction set: the width follows the flags that a translation unit is
// compiled with. Compilers without vector types get one-number "vectors".
#pragma once

#include "../numbers.h"
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define PEFT_D2_VECTOR_BYTES 64
#elif defined(__AVX__)
#define PEFT_D2_VECTOR_BYTES 32
#else
#define PEFT_D2_VECTOR_BYTES 16
#endif

namespace peft_d2 {
// Internal linkage: each instruction set has its own copy of everything below.
namespace {

#if defined(__GNUC__)
template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(PEFT_D2_VECTOR_BYTES)));
  static constexpr int lanes = PEFT_D2_VECTOR_BYTES / int(sizeof(A));
};
#else
template <typename A>
struct VectorOf {
  using type = A;
  static constexpr int lanes = 1;
};
#endif
template <typename A>
using Vector = typename VectorOf<A>::type;

PEFT_D2_INLINE Vector<float> load(const float* from) {
  Vector<float> to;
  memcpy(&to, from, sizeof(to));
  return to;
}
PEFT_D2_INLINE Vector<double> load(const double* from) {
  Vector<double> to;
  memcpy(&to, from, sizeof(to));
  return to;
}

template <typename A>
PEFT_D2_INLINE void store(A* to, Vector<A> from) {
  memcpy(to, &from, sizeof(from));
}

#if defined(__GNUC__)
typedef uint32_t WideBits __attribute__((vector_size(PEFT_D2_VECTOR_BYTES)));
typedef uint16_t NarrowBits __attribute__((vector_size(PEFT_D2_VECTOR_BYTES / 2)));

template <typename T>
PEFT_D2_INLINE WideBits load_bits(const T* from) {
  NarrowBits bits;
  memcpy(&bits, from, sizeof(bits));
  return __builtin_convertvector(bits, WideBits);
}
PEFT_D2_INLINE Vector<float> load(const BFloat16* from) {
  return bits_as<Vector<float>>(load_bits(from) << 16);
}
PEFT_D2_INLINE Vector<float> load(const Half* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  const WideBits bits = load_bits(from);
  const WideBits magnitude = (bits & 0x7fffu) << 13;
  const Vector<float> finite = bits_as<Vector<float>>(magnitude) * 0x1p112f;
  const WideBits special = WideBits(magnitude >= 0x0f800000u) & 0x7f800000u;
  return bits_as<Vector<float>>(bits_as<WideBits>(finite) | special | (bits & 0x8000u) << 16);
#endif
}
#else
PEFT_D2_INLINE float load(const BFloat16* from) {
  return widen(*from);
}
PEFT_D2_INLINE float load(const Half* from) {
  return widen(*from);
}
#endif

// The sums of four vectors.
template <typename A>
PEFT_D2_INLINE void sum_four(Vector<A> a, Vector<A> b, Vector<A> c, Vector<A> d, A* sums) {
  const Vector<A> vectors[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    A numbers[VectorOf<A>::lanes];
    memcpy(numbers, &vectors[i], sizeof(numbers));
    A sum = 0;
    for (int j = 0; j < VectorOf<A>::lanes; ++j) sum += numbers[j];
    sums[i] = sum;
  }
}
#if defined(__AVX__) && defined(__GNUC__)
#if defined(__AVX512F__)
PEFT_D2_INLINE __m256 fold(__m512 x) {
  return _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
}
#else
PEFT_D2_INLINE __m256 fold(__m256 x) { return x; }
#endif
PEFT_D2_INLINE void sum_four(
    Vector<float> a, Vector<float> b, Vector<float> c, Vector<float> d, float* sums) {
  const __m256 ab = _mm256_hadd_ps(fold(a), fold(b));
  const __m256 cd = _mm256_hadd_ps(fold(c), fold(d));
  const __m256 halves = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
#endif

// exp(x) for x <= 0 to 2 units in the last place; written so that a loop over it vectorises.
PEFT_D2_INLINE float exp_of_negative(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;  // keeps NaN
  const float shifted = bounded * 1.44269504f + 12582912.0f;  // the integer part ends in the low bits
  const float n = shifted - 12582912.0f;
  const float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;  // Cephes, expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits_as<float>((bits_as<uint32_t>(shifted) - 0x4b400000u + 127u) << 23);
}
PEFT_D2_INLINE double exp_of_negative(double x) { return __builtin_exp(x); }

}  // namespace
}  // namespace peft_d2
