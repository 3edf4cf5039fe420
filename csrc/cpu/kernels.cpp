// The operator's loops. Compiled once for each instruction set, with PEFT_D2_KERNELS naming the table that results.
//
// Forward: queries outside, heads inside, so that a query's frames are made once. Backward: a head at a time, so that
// nothing that is written is shared and no atomics are needed; with many queries the head's rows are first packed into
// consecutive memory. A point's weights and pixels are computed once, for all channels.
#include "kernels.h"

#include "vector.h"

// The arrays of a loop do not overlap.
#if defined(_OPENMP) || defined(__GNUC__)
#define PEFT_D2_SIMD _Pragma("omp simd")
#else
#define PEFT_D2_SIMD
#endif

namespace peft_d2 {
namespace {

// Hands out consecutive, aligned pieces of a buffer; with no buffer it only measures.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_ + used_);
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

// The points of one query and head as a structure of arrays, and what is constant for a call or a query.
template <typename A>
struct Points {
  int64_t count;
  // For a call; a level's number is repeated for each of its points.
  int *width, *height, *start;
  // For a query.
  A *origin_x, *origin_y, *scale_x, *scale_y;
  // For a query and head.
  A *raw_x, *raw_y, *weight;
  A *xl, *xh, *xl_slope, *xh_slope, *yl, *yh, *yl_slope, *yh_slope;
  int *row_ll, *row_lh, *row_hl, *row_hh, *touched;
  A *weight_ll, *weight_lh, *weight_hl, *weight_hh;
  // Backward only.
  A *dot_ll, *dot_lh, *dot_hl, *dot_hh, *grad_weight, *grad_x, *grad_y;

  Points(const Problem& p, Arena& arena) : count(p.levels * p.points) {
    int** const integers[] = {&width, &height, &start, &row_ll, &row_lh, &row_hl, &row_hh, &touched};
    A** const numbers[] = {&origin_x,  &origin_y,  &scale_x,   &scale_y,   &raw_x,  &raw_y,    &weight,
                           &xl,        &xh,        &xl_slope,  &xh_slope,  &yl,     &yh,       &yl_slope,
                           &yh_slope,  &weight_ll, &weight_lh, &weight_hl, &weight_hh, &dot_ll, &dot_lh,
                           &dot_hl,    &dot_hh,    &grad_weight, &grad_x,  &grad_y};
    for (int** array : integers) *array = arena.take<int>(count);
    for (A** array : numbers) *array = arena.take<A>(count);
  }

  void set_levels(const Problem& p) {
    PEFT_D2_SIMD
    for (int64_t k = 0; k < count; ++k) {
      const int64_t level = k / p.points;
      height[k] = int(p.spatial_shapes[2 * level]);
      width[k] = int(p.spatial_shapes[2 * level + 1]);
      start[k] = int(p.level_start_index[level]);
    }
  }

  // `query` counts over N * Q.
  void set_query(const Problem& p, int64_t query) {
    const int64_t size = p.reference_size;
    const A* reference = static_cast<const A*>(p.reference) + query * p.levels * size;
    PEFT_D2_SIMD
    for (int64_t k = 0; k < count; ++k) {
      const A* numbers = reference + k / p.points * size;
      const A x = size ? numbers[0] : A(0), y = size ? numbers[1] : A(0);
      const A w = size == 4 ? numbers[2] : A(0), h = size == 4 ? numbers[3] : A(0);
      origin_x[k] = frame_origin(x, A(width[k]), size);
      origin_y[k] = frame_origin(y, A(height[k]), size);
      scale_x[k] = frame_scale(w, A(width[k]), A(p.points), size);
      scale_y[k] = frame_scale(h, A(height[k]), A(p.points), size);
    }
  }

  // `item` counts over N * Q * M.
  template <typename C>
  void set_head(const Problem& p, int64_t item) {
    const C* raw = static_cast<const C*>(p.raw) + item * count * 2;
    const C* numbers = static_cast<const C*>(p.weights) + item * count;
    PEFT_D2_SIMD
    for (int64_t k = 0; k < count; ++k) {
      raw_x[k] = widen(raw[2 * k]);
      raw_y[k] = widen(raw[2 * k + 1]);
      weight[k] = widen(numbers[k]);
    }
    if (p.reference_size) softmax();
    locate_all();
  }

  void softmax() {
    A most = weight[0];
    for (int64_t k = 1; k < count; ++k) most = weight[k] > most ? weight[k] : most;
    PEFT_D2_SIMD
    for (int64_t k = 0; k < count; ++k) weight[k] = exp_of_negative(weight[k] - most);
    A sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += weight[k];
    const A scale = A(1) / sum;
    PEFT_D2_SIMD
    for (int64_t k = 0; k < count; ++k) weight[k] *= scale;
  }

  void locate_all() {
    PEFT_D2_SIMD
    for (int64_t k = 0; k < count; ++k) {
      const Axis<A> x = locate(origin_x[k] + scale_x[k] * raw_x[k], width[k]);
      const Axis<A> y = locate(origin_y[k] + scale_y[k] * raw_y[k], height[k]);
      xl[k] = x.low_weight;
      xh[k] = x.high_weight;
      xl_slope[k] = x.low_slope;
      xh_slope[k] = x.high_slope;
      yl[k] = y.low_weight;
      yh[k] = y.high_weight;
      yl_slope[k] = y.low_slope;
      yh_slope[k] = y.high_slope;
      row_ll[k] = start[k] + y.low * width[k] + x.low;
      row_lh[k] = start[k] + y.low * width[k] + x.high;
      row_hl[k] = start[k] + y.high * width[k] + x.low;
      row_hh[k] = start[k] + y.high * width[k] + x.high;
      touched[k] = (x.high_slope - x.low_slope) * (y.high_slope - y.low_slope) != A(0);
      weight_ll[k] = weight[k] * y.low_weight * x.low_weight;
      weight_lh[k] = weight[k] * y.low_weight * x.high_weight;
      weight_hl[k] = weight[k] * y.high_weight * x.low_weight;
      weight_hh[k] = weight[k] * y.high_weight * x.high_weight;
    }
  }

  // From the dot products to the gradients of raw and weights.
  template <typename C>
  void write_gradients(const Problem& p, const Gradients& g, int64_t item) {
    PEFT_D2_SIMD
    for (int64_t k = 0; k < count; ++k) {
      const PointGradient<A> gradient = point_gradient(
          weight[k], xl[k], xh[k], xl_slope[k], xh_slope[k], yl[k], yh[k], yl_slope[k], yh_slope[k],  //
          dot_ll[k], dot_lh[k], dot_hl[k], dot_hh[k]);
      grad_weight[k] = gradient.weight;
      grad_x[k] = gradient.x;
      grad_y[k] = gradient.y;
    }
    if (p.reference_size) {
      A mean = 0;
      for (int64_t k = 0; k < count; ++k) mean += weight[k] * grad_weight[k];
      for (int64_t k = 0; k < count; ++k) grad_weight[k] = weight[k] * (grad_weight[k] - mean);
    }
    C* to_raw = static_cast<C*>(g.raw) + item * count * 2;
    C* to_weights = static_cast<C*>(g.weights) + item * count;
    PEFT_D2_SIMD
    for (int64_t k = 0; k < count; ++k) {
      narrow(grad_x[k] * scale_x[k], to_raw[2 * k]);
      narrow(grad_y[k] * scale_y[k], to_raw[2 * k + 1]);
      narrow(grad_weight[k], to_weights[k]);
    }
    if (g.reference) write_reference(p, static_cast<A*>(g.reference) + item * p.levels * p.reference_size);
  }

  void write_reference(const Problem& p, A* to) {
    for (int64_t level = 0; level < p.levels; ++level, to += p.reference_size) {
      const A size_x = A(p.spatial_shapes[2 * level + 1]), size_y = A(p.spatial_shapes[2 * level]);
      A x = 0, y = 0, w = 0, h = 0;
      for (int64_t k = level * p.points; k < (level + 1) * p.points; ++k) {
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

// BLOCK vectors of channels of the output, over all points.
template <int BLOCK, typename T, typename A>
PEFT_D2_INLINE void gather_vectors(const Points<A>& points, const T* value, int64_t stride, A* output) {
  constexpr int lanes = VectorOf<A>::lanes;
  Vector<A> sum[BLOCK] = {};
  for (int64_t k = 0; k < points.count; ++k) {
    if (!points.touched[k]) continue;
    const T* ll = value + points.row_ll[k] * stride;
    const T* lh = value + points.row_lh[k] * stride;
    const T* hl = value + points.row_hl[k] * stride;
    const T* hh = value + points.row_hh[k] * stride;
    const A w_ll = points.weight_ll[k], w_lh = points.weight_lh[k];
    const A w_hl = points.weight_hl[k], w_hh = points.weight_hh[k];
    for (int b = 0; b < BLOCK; ++b) {
      sum[b] += load(ll + b * lanes) * w_ll + load(lh + b * lanes) * w_lh + load(hl + b * lanes) * w_hl +
                load(hh + b * lanes) * w_hh;
    }
  }
  for (int b = 0; b < BLOCK; ++b) store(output + b * lanes, sum[b]);
}

template <typename T, typename A>
void gather(const Points<A>& points, const T* value, int64_t stride, int64_t channels, A* output) {
  constexpr int lanes = VectorOf<A>::lanes;
  constexpr int block = lanes >= 16 ? 2 : (lanes >= 8 ? 4 : 8);  // 32 floats at a time
  int64_t c = 0;
  for (; c + block * lanes <= channels; c += block * lanes) gather_vectors<block>(points, value + c, stride, output + c);
  for (; c + lanes <= channels; c += lanes) gather_vectors<1>(points, value + c, stride, output + c);
  for (; c < channels; ++c) {
    A sum = 0;
    for (int64_t k = 0; k < points.count; ++k) {
      if (!points.touched[k]) continue;
      sum += points.weight_ll[k] * widen(value[points.row_ll[k] * stride + c]) +
             points.weight_lh[k] * widen(value[points.row_lh[k] * stride + c]) +
             points.weight_hl[k] * widen(value[points.row_hl[k] * stride + c]) +
             points.weight_hh[k] * widen(value[points.row_hh[k] * stride + c]);
    }
    output[c] = sum;
  }
}

template <typename T, typename C>
void forward(const Problem& p, void* output, void* scratch, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  Arena arena(scratch);
  Points<A> points(p, arena);
  A* sums = arena.take<A>(p.channels);
  const int64_t stride = p.heads * p.channels;
  points.set_levels(p);
  for (int64_t query = begin; query < end; ++query) {
    const T* value = static_cast<const T*>(p.value) + query / p.queries * p.s * stride;
    points.set_query(p, query);
    for (int64_t head = 0; head < p.heads; ++head) {
      points.template set_head<C>(p, query * p.heads + head);
      gather(points, value + head * p.channels, stride, p.channels, sums);
      T* row = static_cast<T*>(output) + query * stride + head * p.channels;
      for (int64_t c = 0; c < p.channels; ++c) narrow(sums[c], row[c]);
    }
  }
}

// One corner of one point: adds its share to the gradient of value and returns vectors that sum to the dot product.
template <typename V, typename A>
PEFT_D2_INLINE Vector<A> scatter_vector(const V* value, A* grad_value, Vector<A> grad, A weight) {
  const Vector<A> product = load(value) * grad;
  store(grad_value, load(grad_value) + grad * weight);
  return product;
}

// All points of one query and head. `value` and `grad_value` are rows of a stride of their own.
template <typename V, typename A>
void scatter(
    const Points<A>& points, const A* grad, int64_t channels, const V* value, int64_t stride, A* grad_value,
    int64_t grad_stride) {
  constexpr int lanes = VectorOf<A>::lanes;
  for (int64_t k = 0; k < points.count; ++k) {
    A dots[4] = {0, 0, 0, 0};
    if (points.touched[k]) {
      const int64_t rows[4] = {points.row_ll[k], points.row_lh[k], points.row_hl[k], points.row_hh[k]};
      const A weights[4] = {points.weight_ll[k], points.weight_lh[k], points.weight_hl[k], points.weight_hh[k]};
      const V *v0 = value + rows[0] * stride, *v1 = value + rows[1] * stride;
      const V *v2 = value + rows[2] * stride, *v3 = value + rows[3] * stride;
      A *g0 = grad_value + rows[0] * grad_stride, *g1 = grad_value + rows[1] * grad_stride;
      A *g2 = grad_value + rows[2] * grad_stride, *g3 = grad_value + rows[3] * grad_stride;
      Vector<A> d0{}, d1{}, d2{}, d3{};
      int64_t c = 0;
      for (; c + lanes <= channels; c += lanes) {
        const Vector<A> g = load(grad + c);
        d0 += scatter_vector(v0 + c, g0 + c, g, weights[0]);
        d1 += scatter_vector(v1 + c, g1 + c, g, weights[1]);
        d2 += scatter_vector(v2 + c, g2 + c, g, weights[2]);
        d3 += scatter_vector(v3 + c, g3 + c, g, weights[3]);
      }
      sum_four(d0, d1, d2, d3, dots);
      for (; c < channels; ++c) {
        for (int i = 0; i < 4; ++i) {
          dots[i] += widen(value[rows[i] * stride + c]) * grad[c];
          grad_value[rows[i] * grad_stride + c] += weights[i] * grad[c];
        }
      }
    }
    points.dot_ll[k] = dots[0];
    points.dot_lh[k] = dots[1];
    points.dot_hl[k] = dots[2];
    points.dot_hh[k] = dots[3];
  }
}

// Channels of a packed row: whole vectors, so that there is no remainder to loop over.
template <typename A>
int64_t packed_channels(const Problem& p) {
  constexpr int64_t lanes = VectorOf<A>::lanes;
  return (p.channels + lanes - 1) / lanes * lanes;
}

// Packing reads and writes each row once more; it pays when rows are visited several times.
inline bool many_queries(const Problem& p) { return p.queries * p.levels * p.points >= 2 * p.s; }

template <typename T, typename C>
struct Backward {
  using A = Accumulator<T>;

  const Problem& p;
  const Gradients& g;
  Arena arena;
  Points<A> points;
  int64_t stride, packed;
  A *grad, *value_rows, *grad_rows;

  Backward(const Problem& problem, const Gradients& gradients, void* scratch)
      : p(problem), g(gradients), arena(scratch), points(p, arena), stride(p.heads * p.channels),
        packed(packed_channels<A>(p)) {
    grad = arena.take<A>(packed);
    value_rows = arena.take<A>(many_queries(p) ? p.s * packed : 0);
    grad_rows = arena.take<A>(p.s * packed);
  }

  void pack(const T* value) {
    for (int64_t row = 0; row < p.s; ++row, value += stride) {
      A* to = value_rows + row * packed;
      for (int64_t c = 0; c < p.channels; ++c) to[c] = widen(value[c]);
      for (int64_t c = p.channels; c < packed; ++c) to[c] = A(0);
    }
  }

  void unpack(T* grad_value) {
    for (int64_t row = 0; row < p.s; ++row, grad_value += stride) {
      for (int64_t c = 0; c < p.channels; ++c) narrow(grad_rows[row * packed + c], grad_value[c]);
    }
  }

  template <typename V>
  void queries(int64_t n, int64_t head, const V* value, int64_t value_stride, int64_t channels) {
    for (int64_t query = n * p.queries; query < (n + 1) * p.queries; ++query) {
      const int64_t item = query * p.heads + head;
      const T* from = static_cast<const T*>(g.output) + item * p.channels;
      for (int64_t c = 0; c < p.channels; ++c) grad[c] = widen(from[c]);
      points.set_query(p, query);
      points.template set_head<C>(p, item);
      scatter(points, grad, channels, value, value_stride, grad_rows, packed);
      points.template write_gradients<C>(p, g, item);
    }
  }

  void run(int64_t begin, int64_t end) {
    points.set_levels(p);
    for (int64_t c = p.channels; c < packed; ++c) grad[c] = A(0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / p.heads, head = task % p.heads;
      const int64_t first = n * p.s * stride + head * p.channels;
      const T* value = static_cast<const T*>(p.value) + first;
      memset(grad_rows, 0, size_t(p.s * packed) * sizeof(A));
      if (many_queries(p)) {
        pack(value);
        queries(n, head, value_rows, packed, packed);
      } else {
        queries(n, head, value, stride, p.channels);
      }
      unpack(static_cast<T*>(g.value) + first);
    }
  }
};

template <typename T, typename C>
size_t scratch_bytes(const Problem& p, bool backward) {
  if (backward) return Backward<T, C>(p, Gradients{}, nullptr).arena.used();
  Arena arena(nullptr);
  Points<Accumulator<T>> points(p, arena);
  arena.take<Accumulator<T>>(p.channels);
  return arena.used();
}

template <typename T, typename C>
struct Pair {
  using Value = T;
  using Coordinate = C;
};

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

void forward_any(Types types, const Problem& p, void* output, void* scratch, int64_t begin, int64_t end) {
  visit(types, [&](auto pair) {
    forward<typename decltype(pair)::Value, typename decltype(pair)::Coordinate>(p, output, scratch, begin, end);
  });
}

void backward_any(Types types, const Problem& p, const Gradients& g, void* scratch, int64_t begin, int64_t end) {
  visit(types, [&](auto pair) {
    Backward<typename decltype(pair)::Value, typename decltype(pair)::Coordinate>(p, g, scratch).run(begin, end);
  });
}

size_t scratch_bytes_any(Types types, const Problem& p, bool backward) {
  size_t bytes = 0;
  visit(types, [&](auto pair) {
    bytes = scratch_bytes<typename decltype(pair)::Value, typename decltype(pair)::Coordinate>(p, backward);
  });
  return bytes;
}

}  // namespace

extern const Kernels PEFT_D2_KERNELS = {forward_any, backward_any, scratch_bytes_any};

}  // namespace peft_d2
