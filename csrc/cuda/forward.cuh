// The forward pass: a group gathers the rows of its points, each thread a vector of channels.
#pragma once

#include "points.cuh"

namespace peft_d2 {
namespace {

// A point as the forward pass needs it. Rows as in points.cuh.
template <typename A>
struct alignas(16) ForwardPoint {
  A weight[4];  // of the corners, the attention weight included
  int row[4];
};

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
    for (unsigned tile = blockIdx.x; tile < unsigned(tiles); tile += gridDim.x) {  // the sum may pass 2^31
      const int64_t within = query_of(p, plan, levels, int(tile), group);
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

}  // namespace
}  // namespace peft_d2
