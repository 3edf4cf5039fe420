// What the kernels share: levels, tiles, where a point lies, attention weights. The kernels use no more of CUDA than
// tests/ops/cuda_on_host.h imitates, so that machines without a GPU run these very bodies, thread by thread.
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

// Copies the levels into shared memory and stops the kernel where they do not fill value's rows one after the other.
PEFT_D2_DEVICE const Level* load_levels(const Problem& p, unsigned char* memory) {
  Level* levels = reinterpret_cast<Level*>(memory);
  for (int64_t i = threadIdx.x; i < p.levels; i += blockDim.x) {
    const int64_t height = p.spatial_shapes[2 * i], width = p.spatial_shapes[2 * i + 1], start = p.level_start_index[i];
    const int64_t next = i + 1 < p.levels ? p.level_start_index[i + 1] : p.s;
    if (!level_fits(height, width, start, p.s) || start + height * width != next || (i == 0 && start != 0)) {
      printf("ms_deform_attn: level %d does not lie between its neighbours in value's rows; ", int(i));
      printf("check spatial_shapes and level_start_index\n");
      __trap();
    }
    levels[i] = Level{int(height), int(width), int(start), 0};
  }
  __syncthreads();
  return levels;
}

// a / b rounded up; the sum of both may be too large.
PEFT_D2_DEVICE int quotient_up(int a, int b) { return a / b + (a % b != 0); }

// Like rows of value, tiles are fewer than 2^31.
PEFT_D2_DEVICE int tiles_of(const Level& level, int tile_width, int tile_height) {
  return quotient_up(level.width, tile_width) * quotient_up(level.height, tile_height);
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
  const int across = quotient_up(levels[i].width, width);
  const unsigned x = unsigned(tile % across * width) + group % width, y = unsigned(tile / across * height) + group / width;
  const bool inside = x < unsigned(levels[i].width) && y < unsigned(levels[i].height);
  return inside ? levels[i].start + int64_t(y) * levels[i].width + x : -1;
}

// The rows of a point's corners. A corner outside its level has row -1, and no other row is negative.
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

}  // namespace
}  // namespace peft_d2
