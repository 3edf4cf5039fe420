// The operator's loops. Compiled once for each instruction set, with PEFT_D2_KERNELS naming the table that results.
//
// Forward: queries outside, heads inside, so that a query's frames are made once. Backward: a head at a time, so that
// nothing that is written is shared and no atomics are needed; with many queries the head's rows are first packed into
// consecutive memory. A point's weights and pixels are computed once, for all channels.
#include "kernels.h"

#include "points.h"

namespace peft_d2 {
namespace {

// BLOCK vectors of channels of the output, over all points.
template <int BLOCK, typename T, typename A>
PEFT_D2_INLINE void gather_vectors(const Points<A>& points, int64_t from, const T* value, int64_t stride, A* output) {
  constexpr int lanes = VectorOf<A>::lanes;
  Vector<A> sum[BLOCK] = {};
  for (int64_t k = from; k < from + points.count; ++k) {
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
void gather(const Points<A>& points, int64_t from, const T* value, int64_t stride, int64_t channels, A* output) {
  constexpr int lanes = VectorOf<A>::lanes;
  constexpr int block = lanes >= 16 ? 2 : (lanes >= 8 ? 4 : 8);  // 32 floats at a time
  int64_t c = 0;
  for (; c + block * lanes <= channels; c += block * lanes) gather_vectors<block>(points, from, value + c, stride, output + c);
  for (; c + lanes <= channels; c += lanes) gather_vectors<1>(points, from, value + c, stride, output + c);
  for (; c < channels; ++c) {
    A sum = 0;
    for (int64_t k = from; k < from + points.count; ++k) {
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
  points.set_levels();
  const int64_t last = end * p.heads;
  for (int64_t first = begin * p.heads; first < last; first += points.capacity) {
    points.template set_items<C, false>(first, 1, first + points.capacity < last ? points.capacity : last - first);
    for (int64_t i = 0; i < points.items; ++i) {
      const int64_t item = first + i, head = item % p.heads, n = item / (p.heads * p.queries);
      const T* value = static_cast<const T*>(p.value) + n * p.s * stride + head * p.channels;
      gather(points, i * points.count, value, stride, p.channels, sums);
      T* row = static_cast<T*>(output) + item * p.channels;
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
    Points<A>& points, int64_t from, const A* grad, int64_t channels, const V* value, int64_t stride, A* grad_value,
    int64_t grad_stride) {
  constexpr int lanes = VectorOf<A>::lanes;
  for (int64_t k = from; k < from + points.count; ++k) {
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
    value_rows = arena.take<A>(p.pack_value ? p.s * packed : 0);
    grad_rows = arena.take<A>(p.s * packed);
  }

  // Rows of one head lie far apart: hardware does not foresee them.
  void prefetch(const T* row) const {
#if defined(__GNUC__)
    for (int64_t c = 0; c < p.channels; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + 12 * stride + c);
#endif
  }

  void pack(const T* value) {
    for (int64_t row = 0; row < p.s; ++row, value += stride) {
      prefetch(value);
      A* to = value_rows + row * packed;
      for (int64_t c = 0; c < p.channels; ++c) to[c] = widen(value[c]);
      for (int64_t c = p.channels; c < packed; ++c) to[c] = A(0);
    }
  }

  void unpack(T* grad_value) {
    for (int64_t row = 0; row < p.s; ++row, grad_value += stride) {
      prefetch(grad_value);
      for (int64_t c = 0; c < p.channels; ++c) narrow(grad_rows[row * packed + c], grad_value[c]);
    }
  }

  template <typename V>
  void queries(int64_t n, int64_t head, const V* value, int64_t value_stride, int64_t channels) {
    for (int64_t query = 0; query < p.queries; query += points.capacity) {
      const int64_t number = query + points.capacity < p.queries ? points.capacity : p.queries - query;
      const int64_t first = (n * p.queries + query) * p.heads + head;
      points.template set_items<C, true>(first, p.heads, number);
      for (int64_t i = 0; i < number; ++i) {
        const T* from = static_cast<const T*>(g.output) + (first + i * p.heads) * p.channels;
        prefetch(from);
        for (int64_t c = 0; c < p.channels; ++c) grad[c] = widen(from[c]);
        scatter(points, i * points.count, grad, channels, value, value_stride, grad_rows, packed);
      }
      points.template write_gradients<C>(g);
    }
  }

  void run(int64_t begin, int64_t end) {
    points.set_levels();
    for (int64_t c = p.channels; c < packed; ++c) grad[c] = A(0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / p.heads, head = task % p.heads;
      const int64_t first = n * p.s * stride + head * p.channels;
      const T* value = static_cast<const T*>(p.value) + first;
      memset(grad_rows, 0, size_t(p.s * packed) * sizeof(A));
      if (p.pack_value) {
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
