// The operator's kernels. They use no more of CUDA than tests/ops/cuda_on_host.h imitates, so that machines without a GPU
// run these very bodies, thread by thread.
#pragma once

#include "../numbers.h"
#include "plan.h"

#if defined(__CUDACC__)
#define PEFT_D2_DEVICE __device__ __forceinline__
#define PEFT_D2_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace peft_d2 {
namespace {

template <typename T, int VECTOR>
struct alignas(sizeof(T) * VECTOR) Pack {
  T numbers[VECTOR];
};

// A point as the forward pass needs it. A corner outside its level has row -1, and no other row is negative.
template <typename A>
struct alignas(16) ForwardPoint {
  A weight[4];  // of the corners, the attention weight included
  int row[4];
};

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

PEFT_D2_DEVICE unsigned warp_mask() {
  const unsigned rest = blockDim.x - threadIdx.x / 32 * 32;
  return rest >= 32 ? 0xffffffffu : (1u << rest) - 1u;
}

template <typename A>
PEFT_D2_DEVICE A group_sum(A x, const Plan& plan, unsigned mask) {
  for (int offset = plan.lanes() / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(mask, x, offset);
  return x;
}

template <typename A>
PEFT_D2_DEVICE A group_max(A x, const Plan& plan, unsigned mask) {
  for (int offset = plan.lanes() / 2; offset > 0; offset /= 2) {
    const A other = __shfl_xor_sync(mask, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

// Copies the levels into shared memory and stops the kernel when they do not fit value.
PEFT_D2_DEVICE const Level* load_levels(const Problem& p, unsigned char* memory) {
  Level* levels = reinterpret_cast<Level*>(memory);
  for (int64_t i = threadIdx.x; i < p.levels; i += blockDim.x) {
    const int64_t height = p.spatial_shapes[2 * i], width = p.spatial_shapes[2 * i + 1], start = p.level_start_index[i];
    const bool fits = height >= 0 && width >= 0 && start >= 0 && height <= p.s && width <= p.s && start + height * width <= p.s;
    if (!fits) {
      printf("ms_deform_attn: level %d lies outside value; check spatial_shapes and level_start_index\n", int(i));
      __trap();
    }
    levels[i] = Level{int(height), int(width), int(start), 0};
  }
  __syncthreads();
  return levels;
}

// Like rows of value, tiles are fewer than 2^31.
PEFT_D2_DEVICE int tiles_of(const Level& level, int tile_width, int tile_height) {
  return (level.width + tile_width - 1) / tile_width * ((level.height + tile_height - 1) / tile_height);
}

PEFT_D2_DEVICE int tile_count(const Plan& plan, const Level* levels) {
  if (!plan.tile_width) return plan.blocks;
  int count = 0;
  for (int i = 0; i < plan.levels; ++i) count += tiles_of(levels[i], plan.tile_width, plan.groups / plan.tile_width);
  return count;
}

// The query of a group, or -1 where a tile reaches over the edge.
PEFT_D2_DEVICE int64_t query_of(const Problem& p, const Plan& plan, const Level* levels, int tile, int group) {
  if (!plan.tile_width) {
    const int64_t query = int64_t(tile) * plan.groups + group;
    return query < p.queries ? query : -1;
  }
  const int width = plan.tile_width, height = plan.groups / plan.tile_width;
  int i = 0;
  for (int tiles; (tiles = tiles_of(levels[i], width, height)) <= tile; ++i) tile -= tiles;
  const int across = (levels[i].width + width - 1) / width;
  const int x = tile % across * width + group % width;
  const int y = tile / across * height + group / width;
  return x < levels[i].width && y < levels[i].height ? levels[i].start + int64_t(y) * levels[i].width + x : -1;
}

template <typename A>
PEFT_D2_DEVICE void set_rows(const Level& level, const Axis<A>& x, const Axis<A>& y, int* row) {
  const bool xl = x.low_slope != A(0), xh = x.high_slope != A(0), yl = y.low_slope != A(0), yh = y.high_slope != A(0);
  row[0] = yl && xl ? level.start + y.low * level.width + x.low : -1;
  row[1] = yl && xh ? level.start + y.low * level.width + x.high : -1;
  row[2] = yh && xl ? level.start + y.high * level.width + x.low : -1;
  row[3] = yh && xh ? level.start + y.high * level.width + x.high : -1;
}

// Where point k of an item lies: both axes in pixels, the corners' rows, and what the backward pass multiplies by.
template <typename A>
struct Place {
  A raw_x, raw_y, scale_x, scale_y;
  Axis<A> x, y;
  int row[4];
};

template <typename A, typename C>
PEFT_D2_DEVICE Place<A> place(
    const Problem& p, const Plan& plan, const Level* levels, int64_t query, int64_t item, int k) {
  const int i = k / plan.points;
  const Level level = levels[i];
  const C* raw = static_cast<const C*>(p.raw) + (item * plan.count + k) * 2;
  const int size = int(p.reference_size);
  const A* reference = static_cast<const A*>(p.reference) + (query * plan.levels + i) * size;
  Place<A> place;
  place.raw_x = widen(raw[0]);
  place.raw_y = widen(raw[1]);
  place.scale_x = frame_scale(size == 4 ? reference[2] : A(0), A(level.width), A(p.points), size);
  place.scale_y = frame_scale(size == 4 ? reference[3] : A(0), A(level.height), A(p.points), size);
  const A x = frame_origin(size ? reference[0] : A(0), A(level.width), size) + place.scale_x * place.raw_x;
  const A y = frame_origin(size ? reference[1] : A(0), A(level.height), size) + place.scale_y * place.raw_y;
  place.x = locate(x, level.width);
  place.y = locate(y, level.height);
  set_rows(level, place.x, place.y, place.row);
  return place;
}
PEFT_D2_DEVICE float exp_of(float x) { return expf(x); }
PEFT_D2_DEVICE double exp_of(double x) { return exp(x); }

// The attention weights of an item: attention(k) for each point that the calling thread asks for.
template <typename A, typename C>
struct Attention {
  const C* numbers;
  A most, scale;
  bool softmax;

  PEFT_D2_DEVICE Attention(const Problem& p, const Plan& plan, int64_t item, bool active, int lane, unsigned mask)
      : numbers(static_cast<const C*>(p.weights) + item * plan.count), most(-INFINITY), scale(1),
        softmax(p.reference_size != 0) {
    if (!softmax) return;
    const int count = active ? plan.count : 0;
    for (int k = lane; k < count; k += plan.lanes()) most = widen(numbers[k]) > most ? widen(numbers[k]) : most;
    most = group_max(most, plan, mask);
    A sum = 0;
    for (int k = lane; k < count; k += plan.lanes()) sum += exp_of(widen(numbers[k]) - most);
    scale = A(1) / group_sum(sum, plan, mask);
  }

  PEFT_D2_DEVICE A operator()(int k) const {
    const A number = widen(numbers[k]);
    return softmax ? exp_of(number - most) * scale : number;
  }
};

// All four loads are under way before the first is used; corners outside are zero and read nothing.
template <typename T, int VECTOR>
PEFT_D2_DEVICE void load_corners(Pack<T, VECTOR>* corners, const T* value, const int* row, int stride) {
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    corners[corner] = Pack<T, VECTOR>{};
    if (row[corner] >= 0) {
      corners[corner] = *reinterpret_cast<const Pack<T, VECTOR>*>(value + int64_t(row[corner]) * stride);
    }
  }
}

template <typename T, typename C, int VECTOR>
__global__ void __launch_bounds__(256) forward_kernel(Problem p, Plan plan, T* output) {
  using A = Accumulator<T>;
  PEFT_D2_SHARED(memory);
  const Level* levels = load_levels(p, memory);
  const int lane = int(threadIdx.x) & (plan.lanes() - 1), group = int(threadIdx.x) >> plan.lanes_log2;
  const int count = plan.count, tiles = tile_count(plan, levels), channels = int(p.channels);
  const unsigned mask = warp_mask();
  ForwardPoint<A>* points = reinterpret_cast<ForwardPoint<A>*>(memory + plan.level_bytes + group * plan.group_bytes);

  for (int64_t part = blockIdx.y; part < plan.heads; part += gridDim.y) {
    const int64_t n = part / p.heads, head = part % p.heads;
    const T* value = static_cast<const T*>(p.value) + n * p.s * plan.stride + head * channels;
    for (int tile = int(blockIdx.x); tile < tiles; tile += int(gridDim.x)) {
      const int64_t within = query_of(p, plan, levels, tile, group);
      const bool active = within >= 0;
      const int64_t query = n * p.queries + (active ? within : 0), item = query * p.heads + head;
      const Attention<A, C> attention(p, plan, item, active, lane, mask);
      for (int k = lane; active && k < count; k += plan.lanes()) {
        const Place<A> at = place<A, C>(p, plan, levels, query, item, k);
        const A weight = attention(k);
        ForwardPoint<A> point;
        for (int corner = 0; corner < 4; ++corner) point.row[corner] = at.row[corner];
        point.weight[0] = weight * at.y.low_weight * at.x.low_weight;
        point.weight[1] = weight * at.y.low_weight * at.x.high_weight;
        point.weight[2] = weight * at.y.high_weight * at.x.low_weight;
        point.weight[3] = weight * at.y.high_weight * at.x.high_weight;
        points[k] = point;
      }
      __syncwarp(mask);
      for (int c = lane * VECTOR; active && c < channels; c += plan.lanes() * VECTOR) {
        A sum[VECTOR] = {};
#pragma unroll 2
        for (int k = 0; k < count; ++k) {
          const ForwardPoint<A> point = points[k];
          Pack<T, VECTOR> corners[4];
          load_corners(corners, value + c, point.row, plan.stride);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) sum[i] += point.weight[corner] * widen(corners[corner].numbers[i]);
          }
        }
        Pack<T, VECTOR> to;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) narrow(sum[i], to.numbers[i]);
        *reinterpret_cast<Pack<T, VECTOR>*>(output + item * channels + c) = to;
      }
      __syncwarp(mask);  // before the next tile's points replace these
    }
  }
}

template <int VECTOR>
PEFT_D2_DEVICE void add_atomically(double* to, const double* numbers) {
  for (int i = 0; i < VECTOR; ++i) atomicAdd(to + i, numbers[i]);
}

template <int VECTOR>
PEFT_D2_DEVICE void add_atomically(float* to, const float* numbers) {
  int i = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#pragma unroll
  for (; i + 4 <= VECTOR; i += 4) {
    atomicAdd(reinterpret_cast<float4*>(to + i), float4{numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]});
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
    A sums[4] = {0, 0, 0, 0};
    for (int k = i * plan.points; k < (i + 1) * plan.points; ++k) {
      sums[0] += points[k].grad_x * size_x;
      sums[1] += points[k].grad_y * size_y;
      sums[2] += points[k].grad_x * widen(raw[2 * k]) * box_slope(size_x, A(p.points));
      sums[3] += points[k].grad_y * widen(raw[2 * k + 1]) * box_slope(size_y, A(p.points));
    }
    A* reference = to.reference + (item * plan.levels + i) * p.reference_size;
    for (int j = 0; j < p.reference_size; ++j) reference[j] = sums[j];
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
    for (int tile = int(blockIdx.x); tile < tiles; tile += int(gridDim.x)) {
      const int64_t within = query_of(p, plan, levels, tile, group);
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
