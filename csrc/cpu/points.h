// The points of a few queries and heads as a structure of arrays: where they lie, what they weigh, their gradients.
#pragma once

#include <cstddef>

#include "vector.h"

// The arrays of a loop do not overlap.
#if defined(__GNUC__)
#define PEFT_D2_SIMD _Pragma("omp simd")
#else
#define PEFT_D2_SIMD
#endif

namespace peft_d2 {
namespace {

// Hands out consecutive, aligned pieces of a buffer; with no buffer it only measures.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(reinterpret_cast<uintptr_t>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  uintptr_t memory_;
  size_t used_ = 0;
};

// An item is one query and head, counted over N * Q * M; it has `count` = L * P points. A batch holds a few items, so that
// loops over points are long enough for vectors and run ahead of the loops over channels.
template <typename A>
struct Points {
  const Problem& p;
  const int64_t count, capacity, padded;
  int64_t items = 0, first_item = 0, item_stride = 0;
  // Constant for a call.
  int *width, *height, *start;
  // Where the points are; origin and scale as in ms_deform_attn.h.
  A *origin_x, *origin_y, *scale_x, *scale_y, *raw_x, *raw_y, *weight;
  A *xl, *xh, *yl, *yh;
  int *row_ll, *row_lh, *row_hl, *row_hh, *touched;
  A *weight_ll, *weight_lh, *weight_hl, *weight_hh;
  // Backward only.
  A *xl_slope, *xh_slope, *yl_slope, *yh_slope;
  A *dot_ll, *dot_lh, *dot_hl, *dot_hh, *grad_weight, *grad_x, *grad_y;

  Points(const Problem& problem, Arena& arena)
      : p(problem), count(p.levels * p.points), capacity(count < 96 && count > 0 ? 96 / count : 1),
        padded((capacity * count + 15) / 16 * 16) {
    int** const integers[] = {&width, &height, &start, &row_ll, &row_lh, &row_hl, &row_hh, &touched};
    A** const numbers[] = {
        &origin_x, &origin_y, &scale_x, &scale_y, &raw_x, &raw_y, &weight, &xl, &xh, &yl, &yh, &weight_ll, &weight_lh,
        &weight_hl, &weight_hh, &xl_slope, &xh_slope, &yl_slope, &yh_slope, &dot_ll, &dot_lh, &dot_hl, &dot_hh,
        &grad_weight, &grad_x, &grad_y};
    for (int** array : integers) *array = arena.take<int>(padded);
    for (A** array : numbers) *array = arena.take<A>(padded);
  }

  // Points beyond the last item lie on an empty level.
  void set_levels() {
    for (int64_t k = 0; k < padded; ++k) {
      const bool real = k < capacity * count;
      const int64_t level = real ? k % count / p.points : 0;
      height[k] = real ? int(p.spatial_shapes[2 * level]) : 0;
      width[k] = real ? int(p.spatial_shapes[2 * level + 1]) : 0;
      start[k] = real ? int(p.level_start_index[level]) : 0;
      origin_x[k] = origin_y[k] = scale_x[k] = scale_y[k] = raw_x[k] = raw_y[k] = weight[k] = A(0);
    }
  }

  // Items first, first + stride, ...
  template <typename C, bool BACKWARD>
  void set_items(int64_t first, int64_t stride, int64_t number) {
    first_item = first, item_stride = stride, items = number;
    for (int64_t i = 0; i < items; ++i) {
      const int64_t item = first + i * stride, from = i * count;
      const C* raw = static_cast<const C*>(p.raw) + item * count * 2;
      const C* numbers = static_cast<const C*>(p.weights) + item * count;
      PEFT_D2_SIMD
      for (int64_t k = 0; k < count; ++k) {
        raw_x[from + k] = widen(raw[2 * k]);
        raw_y[from + k] = widen(raw[2 * k + 1]);
        weight[from + k] = widen(numbers[k]);
      }
      set_frames(item / p.heads, from);
    }
    if (p.reference_size) softmax();
    locate_all<BACKWARD>();
  }

  // `query` counts over N * Q.
  void set_frames(int64_t query, int64_t from) {
    const int64_t size = p.reference_size;
    const A* reference = static_cast<const A*>(p.reference) + query * p.levels * size;
    for (int64_t first = from; first < from + count; first += p.points, reference += size) {
      const A size_x = A(width[first]), size_y = A(height[first]);
      const A x = frame_origin(size ? reference[0] : A(0), size_x, size);
      const A y = frame_origin(size ? reference[1] : A(0), size_y, size);
      const A w = frame_scale(size == 4 ? reference[2] : A(0), size_x, A(p.points), size);
      const A h = frame_scale(size == 4 ? reference[3] : A(0), size_y, A(p.points), size);
      PEFT_D2_SIMD
      for (int64_t k = first; k < first + p.points; ++k) {
        origin_x[k] = x;
        origin_y[k] = y;
        scale_x[k] = w;
        scale_y[k] = h;
      }
    }
  }

  void softmax() {
    for (int64_t i = 0; i < items; ++i) {
      A* numbers = weight + i * count;
      A most = numbers[0];
      for (int64_t k = 1; k < count; ++k) most = numbers[k] > most ? numbers[k] : most;
      PEFT_D2_SIMD
      for (int64_t k = 0; k < count; ++k) numbers[k] -= most;
    }
    PEFT_D2_SIMD
    for (int64_t k = 0; k < padded; ++k) weight[k] = exp_of_negative(weight[k]);
    for (int64_t i = 0; i < items; ++i) {
      A* numbers = weight + i * count;
      A sum = 0;
      for (int64_t k = 0; k < count; ++k) sum += numbers[k];
      const A scale = A(1) / sum;
      PEFT_D2_SIMD
      for (int64_t k = 0; k < count; ++k) numbers[k] *= scale;
    }
  }

  template <bool BACKWARD>
  void locate_all() {
    PEFT_D2_SIMD
    for (int64_t k = 0; k < padded; ++k) {
      const Axis<A> x = locate(origin_x[k] + scale_x[k] * raw_x[k], width[k]);
      const Axis<A> y = locate(origin_y[k] + scale_y[k] * raw_y[k], height[k]);
      row_ll[k] = start[k] + y.low * width[k] + x.low;
      row_lh[k] = start[k] + y.low * width[k] + x.high;
      row_hl[k] = start[k] + y.high * width[k] + x.low;
      row_hh[k] = start[k] + y.high * width[k] + x.high;
      touched[k] = (x.high_slope - x.low_slope) * (y.high_slope - y.low_slope) != A(0);
      weight_ll[k] = weight[k] * y.low_weight * x.low_weight;
      weight_lh[k] = weight[k] * y.low_weight * x.high_weight;
      weight_hl[k] = weight[k] * y.high_weight * x.low_weight;
      weight_hh[k] = weight[k] * y.high_weight * x.high_weight;
      if (BACKWARD) {
        xl[k] = x.low_weight;
        xh[k] = x.high_weight;
        yl[k] = y.low_weight;
        yh[k] = y.high_weight;
        xl_slope[k] = x.low_slope;
        xh_slope[k] = x.high_slope;
        yl_slope[k] = y.low_slope;
        yh_slope[k] = y.high_slope;
      }
    }
  }

  // From the dot products to the gradients of raw and weights.
  template <typename C>
  void write_gradients(const Gradients& g) {
    PEFT_D2_SIMD
    for (int64_t k = 0; k < padded; ++k) {
      const PointGradient<A> gradient = point_gradient(
          weight[k], xl[k], xh[k], xl_slope[k], xh_slope[k], yl[k], yh[k], yl_slope[k], yh_slope[k],  //
          dot_ll[k], dot_lh[k], dot_hl[k], dot_hh[k]);
      grad_weight[k] = gradient.weight;
      grad_x[k] = gradient.x;
      grad_y[k] = gradient.y;
    }
    for (int64_t i = 0; i < items; ++i) {
      const int64_t item = first_item + i * item_stride, from = i * count;
      A mean = 0;
      if (p.reference_size) {
        for (int64_t k = from; k < from + count; ++k) mean += weight[k] * grad_weight[k];
      }
      C* to_raw = static_cast<C*>(g.raw) + item * count * 2;
      C* to_weights = static_cast<C*>(g.weights) + item * count;
      PEFT_D2_SIMD
      for (int64_t k = 0; k < count; ++k) {
        const A grad = grad_weight[from + k];
        narrow(grad_x[from + k] * scale_x[from + k], to_raw[2 * k]);
        narrow(grad_y[from + k] * scale_y[from + k], to_raw[2 * k + 1]);
        narrow(p.reference_size ? weight[from + k] * (grad - mean) : grad, to_weights[k]);
      }
      if (g.reference) write_reference(static_cast<A*>(g.reference) + item * p.levels * p.reference_size, from);
    }
  }

  void write_reference(A* to, int64_t from) {
    for (int64_t level = 0; level < p.levels; ++level, from += p.points, to += p.reference_size) {
      const A size_x = A(width[from]), size_y = A(height[from]);
      A x = 0, y = 0, w = 0, h = 0;
      for (int64_t k = from; k < from + p.points; ++k) {
        x += grad_x[k];
        y += grad_y[k];
        w += grad_x[k] * raw_x[k];
        h += grad_y[k] * raw_y[k];
      }
      to[0] = x * size_x;
      to[1] = y * size_y;
      if (p.reference_size == 4) {
        to[2] = w * box_slope(size_x, A(p.points));
        to[3] = h * box_slope(size_y, A(p.points));
      }
    }
  }
};

}  // namespace
}  // namespace peft_d2
