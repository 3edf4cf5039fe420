// The arithmetic of one sample of multi-scale deformable attention, shared by host and device.
//
// Notation of Zhu et al., "Deformable DETR", ICLR 2021, equation 3. A pixel coordinate p has its origin at the centre
// of the level's first pixel, so that a location x in [0, 1] is p = x * W - 1/2. Both forms of the operator are one
// formula, p = origin + scale * raw, with an origin and a scale for each query and level:
//
//   plain                    raw = location  origin = -1/2              scale = W
//   reference points (x, y)  raw = offset    origin = x * W - 1/2       scale = 1
//   boxes (x, y, w, h)       raw = offset    origin = x * W - 1/2       scale = w * W / (2 P)
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PEFT_D2_MEMBER __host__ __device__
#else
#define PEFT_D2_MEMBER
#endif

#if defined(__CUDACC__)
#define PEFT_D2_INLINE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define PEFT_D2_INLINE static __forceinline
#else
// Static: every translation unit is compiled for another instruction set and must keep its own copy.
#define PEFT_D2_INLINE static inline __attribute__((always_inline))
#endif

namespace peft_d2 {

// Type of value, then type of raw and weights; everything else is in the accumulation type.
enum class Types { kDouble, kFloat, kBFloat16, kBFloat16Float, kHalf, kHalfFloat };

// Sizes and inputs of one call; contiguous tensors as the public function documents them.
struct Problem {
  int64_t n, s, heads, channels, queries, levels, points;
  int64_t reference_size;  // 0: plain form; 2 or 4: fused form, numbers of a reference point
  const int64_t* spatial_shapes;
  const int64_t* level_start_index;
  const void* value;
  const void* reference;  // accumulation type
  const void* raw;        // sampling locations or offsets
  const void* weights;    // attention weights or logits
  bool pack_value;        // CPU backward: whether a head's rows are copied into consecutive memory first
};

struct Gradients {
  const void* output;
  void* value;
  void* raw;
  void* weights;
  void* reference;  // (N, Q, M, L, 2|4) in the accumulation type, one part a head; null when not asked for
};

// Whether a level of height x width pixels from row `start` on lies within s rows; no sum or product can overflow. Levels
// follow one another: each should also begin where the one before ends, the first at row 0, and the last should end at row s.
PEFT_D2_INLINE bool level_fits(int64_t height, int64_t width, int64_t start, int64_t s) {
  constexpr int64_t most = 0x7fffffff;
  const bool sound = height >= 0 && height <= most && width >= 0 && width <= most && start >= 0 && start <= s;
  return sound && height * width <= s - start;
}

// One axis of a query's frame on one level.
template <typename A>
PEFT_D2_INLINE A frame_origin(A reference, A size, int64_t reference_size) {
  return (reference_size ? reference * size : A(0)) - A(0.5);
}

template <typename A>
PEFT_D2_INLINE A frame_scale(A extent, A size, A points, int64_t reference_size) {
  return reference_size == 0 ? size : (reference_size == 2 ? A(1) : extent * size * A(0.5) / points);
}

// d p / d extent = raw * box_slope, for boxes.
template <typename A>
PEFT_D2_INLINE A box_slope(A size, A points) {
  return size * A(0.5) / points;
}

// The two pixels next to a coordinate along one axis. A weight is zero, and its pixel the other one, where the pixel lies
// outside; both slopes (derivatives of the weights) are zero only for a coordinate that touches no pixel at all, and
// its pixels must then not be read.
template <typename A>
struct Axis {
  int low, high;
  A low_weight, high_weight;
  A low_slope, high_slope;
};

PEFT_D2_INLINE float round_down(float x) { return __builtin_floorf(x); }
PEFT_D2_INLINE double round_down(double x) { return __builtin_floor(x); }

// Free of branches, so that a loop over points vectorises. NaN, infinite and distant coordinates become -2, which
// touches nothing, before the conversion to int is made.
template <typename A>
PEFT_D2_INLINE Axis<A> locate(A coordinate, int size) {
  const A bounded = ((coordinate > A(-1)) & (coordinate < A(size))) ? coordinate : A(-2);
  const A floor = round_down(bounded);
  const A fraction = bounded - floor;
  const int low = int(floor);
  const bool has_low = low >= 0;
  const bool has_high = (low >= -1) & (low + 1 < size);
  Axis<A> axis;
  axis.low = has_low ? low : 0;
  axis.high = has_high ? low + 1 : axis.low;
  axis.low_weight = has_low ? A(1) - fraction : A(0);
  axis.high_weight = has_high ? fraction : A(0);
  axis.low_slope = has_low ? A(-1) : A(0);
  axis.high_slope = has_high ? A(1) : A(0);
  return axis;
}

// What the four scalar products (gradient of the output, value of a corner) say about one point.
template <typename A>
struct PointGradient {
  A weight;  // of the attention weight
  A x, y;    // of the pixel coordinates
};

template <typename A>
PEFT_D2_INLINE PointGradient<A> point_gradient(
    A weight, A xl, A xh, A xl_slope, A xh_slope, A yl, A yh, A yl_slope, A yh_slope,  //
    A dot_ll, A dot_lh, A dot_hl, A dot_hh) {
  // dot_<y><x>
  const A row_low = xl * dot_ll + xh * dot_lh;
  const A row_high = xl * dot_hl + xh * dot_hh;
  PointGradient<A> gradient;
  gradient.weight = yl * row_low + yh * row_high;
  gradient.y = weight * (yl_slope * row_low + yh_slope * row_high);
  gradient.x = weight * (yl * (xl_slope * dot_ll + xh_slope * dot_lh) + yh * (xl_slope * dot_hl + xh_slope * dot_hh));
  return gradient;
}

}  // namespace peft_d2
