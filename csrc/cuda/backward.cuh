// The backward pass: with atomics, or in a fixed order where torch asks for deterministic algorithms.
#pragma once

#include "points.cuh"

namespace peft_d2 {
namespace {

// A point as the backward pass needs it; the last three are results. Rows as in points.cuh.
template <typename A>
struct alignas(16) BackwardPoint {
  A xl, xh, yl, yh;
  int row[4];
  A weight, grad_weight, grad_x, grad_y;
};

// What a backward pass writes; `value` and `reference` in the accumulation type.
template <typename T, typename C>
struct Outputs {
  const T* grad_output;
  Accumulator<T>* value;  // null: left to value_gradient_kernel
  C* raw;
  C* weights;
  Accumulator<T>* reference;  // null: not asked for
  Accumulator<T>* attention;  // null, or (N, Q, M, L, P): the attention weights, for value_gradient_kernel
};

template <int VECTOR>
PEFT_D2_DEVICE void add_atomically(double* to, const double* numbers) {
  for (int i = 0; i < VECTOR; ++i) atomicAdd(to + i, numbers[i]);
}

template <int VECTOR>
PEFT_D2_DEVICE void add_atomically(float* to, const float* numbers) {
  int i = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#pragma unroll
  for (; i + 4 <= VECTOR; i += 4) {  // as atomicAdd(float4*, float4) does, but without asking for the old numbers
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "l"(__cvta_generic_to_global(to + i)), "f"(numbers[i]), "f"(numbers[i + 1]), "f"(numbers[i + 2]),
                    "f"(numbers[i + 3]) : "memory");
  }
#endif
#pragma unroll
  for (; i < VECTOR; ++i) atomicAdd(to + i, numbers[i]);
}

// One point for one vector of channels: its share of the gradient of value, and of the four dot products.
template <typename T, int VECTOR, typename A>
PEFT_D2_DEVICE void backward_vector(
    const BackwardPoint<A>& point, const T* value, A* grad_value, int stride, const A* grad, A* dots) {
  const A weights[4] = {
      point.weight * point.yl * point.xl, point.weight * point.yl * point.xh, point.weight * point.yh * point.xl,
      point.weight * point.yh * point.xh};
  Pack<T, VECTOR> corners[4];
  load_corners(corners, value, point.row, stride);
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    A share[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      dots[corner] += grad[i] * widen(corners[corner].numbers[i]);
      share[i] = grad[i] * weights[corner];
    }
    if (grad_value && point.row[corner] >= 0) {
      add_atomically<VECTOR>(grad_value + int64_t(point.row[corner]) * stride, share);
    }
  }
}

template <typename A>
PEFT_D2_DEVICE PointGradient<A> gradient_of(const BackwardPoint<A>& point, const A* dots) {
  // A pixel column or row of the point exists where one of its corners does.
  const A xl = point.row[0] >= 0 || point.row[2] >= 0 ? A(-1) : A(0), xh = point.row[1] >= 0 || point.row[3] >= 0;
  const A yl = point.row[0] >= 0 || point.row[1] >= 0 ? A(-1) : A(0), yh = point.row[2] >= 0 || point.row[3] >= 0;
  return point_gradient(
      point.weight, point.xl, point.xh, xl, xh, point.yl, point.yh, yl, yh, dots[0], dots[1], dots[2], dots[3]);
}

// The last step of an item: through softmax, normaliser and reference points to the inputs.
template <typename A, typename T, typename C>
PEFT_D2_DEVICE void write_gradients(
    const Problem& p, const Plan& plan, const Level* levels, const BackwardPoint<A>* points, const Outputs<T, C>& to,
    int64_t query, int64_t item, int count, int lane, unsigned mask) {
  A mean = 0;
  if (p.reference_size) {
    for (int k = lane; k < count; k += plan.lanes()) mean += points[k].weight * points[k].grad_weight;
    mean = group_sum(mean, plan, mask);
  }
  for (int k = lane; k < count; k += plan.lanes()) {
    const BackwardPoint<A> point = points[k];
    const Place<A> at = place<A, C>(p, plan, levels, query, item, k);
    const int64_t index = item * count + k;
    narrow(point.grad_x * at.scale_x, to.raw[2 * index]);
    narrow(point.grad_y * at.scale_y, to.raw[2 * index + 1]);
    narrow(p.reference_size ? point.weight * (point.grad_weight - mean) : point.grad_weight, to.weights[index]);
    if (to.attention) to.attention[index] = point.weight;
  }
  if (!to.reference || !count) return;
  const C* raw = static_cast<const C*>(p.raw) + item * count * 2;
  for (int i = lane; i < plan.levels; i += plan.lanes()) {
    const A size_x = A(levels[i].width), size_y = A(levels[i].height);
    A x = 0, y = 0, w = 0, h = 0;
    for (int k = i * plan.points; k < (i + 1) * plan.points; ++k) {
      x += points[k].grad_x;
      y += points[k].grad_y;
      w += points[k].grad_x * widen(raw[2 * k]);
      h += points[k].grad_y * widen(raw[2 * k + 1]);
    }
    A* reference = to.reference + (item * plan.levels + i) * p.reference_size;
    reference[0] = x * size_x;
    reference[1] = y * size_y;
    if (p.reference_size == 4) {
      reference[2] = w * box_slope(size_x, A(p.points));
      reference[3] = h * box_slope(size_y, A(p.points));
    }
  }
}

// ONCE: a thread has one vector of channels, whose gradient then stays in registers.
template <typename T, typename C, int VECTOR, bool ONCE>
__global__ void __launch_bounds__(128) backward_kernel(Problem p, Plan plan, Outputs<T, C> to) {
  using A = Accumulator<T>;
  PEFT_D2_SHARED(memory);
  const Level* levels = load_levels(p, memory);
  const int lane = int(threadIdx.x) & (plan.lanes() - 1), group = int(threadIdx.x) >> plan.lanes_log2;
  const int tiles = tile_count(plan, levels), channels = int(p.channels);
  const unsigned mask = warp_mask();
  BackwardPoint<A>* points = reinterpret_cast<BackwardPoint<A>*>(memory + plan.level_bytes + group * plan.group_bytes);

  for (int64_t part = blockIdx.y; part < plan.heads; part += gridDim.y) {
    const int64_t n = part / p.heads, head = part % p.heads, first = n * p.s * plan.stride + head * channels;
    const T* value = static_cast<const T*>(p.value) + first;
    A* grad_value = to.value ? to.value + first : nullptr;
    for (unsigned tile = blockIdx.x; tile < unsigned(tiles); tile += gridDim.x) {  // the sum may pass 2^31
      const int64_t within = query_of(p, plan, levels, int(tile), group);
      const bool active = within >= 0;
      const int count = active ? plan.count : 0;
      const int64_t query = n * p.queries + (active ? within : 0), item = query * p.heads + head;
      const Attention<A, C> attention(p, plan, item, active, lane, mask);
      for (int k = lane; k < count; k += plan.lanes()) {
        const Place<A> at = place<A, C>(p, plan, levels, query, item, k);
        points[k] = BackwardPoint<A>{
            at.x.low_weight, at.x.high_weight, at.y.low_weight, at.y.high_weight,
            {at.row[0], at.row[1], at.row[2], at.row[3]}, attention(k), 0, 0, 0};
      }
      __syncwarp(mask);
      const T* grad_output = to.grad_output + item * channels;
      A grad[VECTOR] = {};
      if (ONCE && active && lane * VECTOR < channels) {
        const Pack<T, VECTOR> from = *reinterpret_cast<const Pack<T, VECTOR>*>(grad_output + lane * VECTOR);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) grad[i] = widen(from.numbers[i]);
      }
      // Every group of a warp takes every turn, as the sums need all of them.
      for (int k = 0; k < plan.count; ++k) {
        PointGradient<A> gradient{0, 0, 0};
        if (active) {
          const BackwardPoint<A> point = points[k];
          A dots[4] = {0, 0, 0, 0};
          for (int c = lane * VECTOR; c < channels; c += plan.lanes() * VECTOR) {
            for (int i = 0; !ONCE && i < VECTOR; ++i) grad[i] = widen(grad_output[c + i]);
            backward_vector<T, VECTOR>(point, value + c, grad_value ? grad_value + c : nullptr, plan.stride, grad, dots);
            if (ONCE) break;
          }
          gradient = gradient_of(point, dots);
        }
        gradient.weight = group_sum(gradient.weight, plan, mask);
        gradient.x = group_sum(gradient.x, plan, mask);
        gradient.y = group_sum(gradient.y, plan, mask);
        __syncwarp(mask);  // all have read the point, which lies in one word with its results
        if (active && lane == 0) {
          points[k].grad_weight = gradient.weight;
          points[k].grad_x = gradient.x;
          points[k].grad_y = gradient.y;
        }
      }
      __syncwarp(mask);
      write_gradients<A>(p, plan, levels, points, to, query, item, count, lane, mask);
      __syncwarp(mask);  // before the next tile's points replace these
    }
  }
}

// The gradient of value without atomics, in a fixed order: a warp owns one row of pixels of one level and head, looks at
// 32 points of that level at a time, and adds those that touch its row one after the other.
template <typename T, typename C>
__global__ void __launch_bounds__(128) value_gradient_kernel(Problem p, Plan plan, Outputs<T, C> from, Accumulator<T>* to) {
  using A = Accumulator<T>;
  PEFT_D2_SHARED(memory);
  const Level* levels = load_levels(p, memory);
  const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32), warps = int(blockDim.x / 32);
  const int64_t stride = plan.stride;
  for (int64_t part = blockIdx.y; part < plan.heads; part += gridDim.y) {
    const int64_t n = part / p.heads, head = part % p.heads;
    A* grad_value = to + n * p.s * stride + head * p.channels;
    int64_t line = int64_t(blockIdx.x) * warps + warp;  // of all levels
    for (int i = 0; i < plan.levels; ++i) {
      const Level level = levels[i];
      for (; line < level.height; line += int64_t(gridDim.x) * warps) {
        for (int64_t base = 0; base < p.queries * p.points; base += 32) {
          const int64_t index = base + lane;
          const bool real = index < p.queries * p.points;
          const int64_t query = n * p.queries + (real ? index / p.points : 0), item = query * p.heads + head;
          const int k = i * plan.points + (real ? int(index % p.points) : 0);
          const Place<A> at = place<A, C>(p, plan, levels, query, item, k);
          const bool low = at.y.low_slope != A(0) && at.y.low == line, high = at.y.high_slope != A(0) && at.y.high == line;
          const bool touches = at.x.low_slope != A(0) || at.x.high_slope != A(0);
          const A weight = from.attention[item * plan.count + k] *
                           ((low ? at.y.low_weight : A(0)) + (high ? at.y.high_weight : A(0)));
          unsigned hits = __ballot_sync(0xffffffffu, real && touches && (low || high));
          for (; hits; hits &= hits - 1) {
            const int owner = __ffs(int(hits)) - 1;
            const int xl = __shfl_sync(0xffffffffu, at.x.low, owner), xh = __shfl_sync(0xffffffffu, at.x.high, owner);
            const A wl = __shfl_sync(0xffffffffu, weight * at.x.low_weight, owner);
            const A wh = __shfl_sync(0xffffffffu, weight * at.x.high_weight, owner);
            const int64_t hit = (n * p.queries + (base + owner) / p.points) * p.heads + head;
            A* row = grad_value + (level.start + line * level.width) * stride;
            for (int64_t c = lane; c < p.channels; c += 32) {
              const A grad = widen(from.grad_output[hit * p.channels + c]);
              row[xl * stride + c] += wl * grad;
              row[xh * stride + c] += wh * grad;
            }
          }
        }
      }
      line -= level.height;
    }
  }
}

}  // namespace
}  // namespace peft_d2
