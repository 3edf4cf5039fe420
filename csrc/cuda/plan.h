// How a call is laid out on the device: which threads serve which query, head and channel.
//
// A group of 1 to 32 neighbouring threads serves one query and head, each thread a vector of its channels. The groups of a
// block serve one head and a tile of queries, two-dimensional where the queries are the pixels themselves (the encoder's
// case), because neighbouring pixels read the same rows of value.
#pragma once

#include <cstdint>

#include "../ms_deform_attn.h"

namespace peft_d2 {

struct Plan {
  int lanes_log2;  // threads of a group
  int groups;      // groups of a block: a power of two
  int tile_width;  // of the 2-D tiles; 0 where queries are served in their order
  int level_bytes, group_bytes, shared_bytes;
  int blocks;              // tiles, about; blocks go on to further ones
  int64_t heads;           // N * M
  int levels, points, count, stride;  // L, P, L * P, and M * D: in 32 bits, as 64-bit products and quotients are slow

  PEFT_D2_MEMBER int lanes() const { return 1 << lanes_log2; }
  PEFT_D2_MEMBER int threads() const { return groups << lanes_log2; }
};

// A level as the kernels keep it in shared memory.
struct Level {
  int height, width, start, spare;
};

constexpr int kSharedBytes = 48 << 10;

// `vector` channels for a thread at a time, `point_bytes` of shared memory for each point. A plan with too many
// shared_bytes is one that cannot run.
inline Plan make_plan(const Problem& p, int vector, int point_bytes, int threads) {
  Plan plan{};
  while (plan.lanes() < 32 && int64_t(plan.lanes()) * vector < p.channels) ++plan.lanes_log2;
  plan.level_bytes = int(p.levels * int64_t(sizeof(Level)));
  // 16 bytes more than needed: groups of a warp then read from different banks.
  const int64_t group_bytes = p.levels * p.points * point_bytes + 16;
  plan.groups = threads >> plan.lanes_log2;
  while (plan.groups > 1 && plan.level_bytes + plan.groups * group_bytes > kSharedBytes) plan.groups /= 2;
  const int64_t bytes = plan.level_bytes + plan.groups * group_bytes;
  plan.group_bytes = int(group_bytes < kSharedBytes ? group_bytes : kSharedBytes);
  plan.shared_bytes = int(bytes < 2 * kSharedBytes ? bytes : 2 * kSharedBytes);
  if (p.queries == p.s) {
    plan.tile_width = 1;
    while (plan.tile_width * plan.tile_width < plan.groups) plan.tile_width *= 2;
  }
  plan.blocks = int((p.queries + plan.groups - 1) / plan.groups);
  plan.heads = p.n * p.heads;
  plan.levels = int(p.levels), plan.points = int(p.points), plan.count = plan.levels * plan.points;
  plan.stride = int(p.heads * p.channels);
  return plan;
}

}  // namespace peft_d2
