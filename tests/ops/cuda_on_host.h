// As much of CUDA as the kernels in csrc/cuda use, for a machine without a GPU: one block after the other, the threads of a
// block as coroutines that change places at barriers and warp operations, in an order drawn anew each time. A barrier that
// not all threads reach ends the program with a message.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#define __global__ static
#define __launch_bounds__(threads)
#define PEFT_D2_DEVICE inline
#define PEFT_D2_SHARED(name) unsigned char* name = cuda_on_host::shared.data()

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

namespace cuda_on_host {

// A meeting place of some threads; each brings a number and may read those of the others.
struct Meeting {
  unsigned expected = 0, arrived = 0, round = 0;
  unsigned char numbers[2][32][8];
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  bool done = false;
};

inline std::vector<unsigned char> shared;
inline std::vector<Thread> threads;
inline std::vector<Meeting> warps;
inline Meeting block;
inline ucontext_t scheduler;
inline unsigned current = 0;
inline const std::function<void()>* body = nullptr;
inline std::mt19937 order{1};
inline unsigned long progress = 0;

inline void give_way() { swapcontext(&threads[current].context, &scheduler); }

// Returns the round whose numbers may be read until two meetings later.
inline unsigned meet(Meeting& meeting, const void* number, size_t bytes) {
  const unsigned round = meeting.round;
  if (bytes) std::copy_n(static_cast<const unsigned char*>(number), bytes, meeting.numbers[round % 2][current % 32]);
  ++progress;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.round;
  } else {
    while (meeting.round == round) give_way();
  }
  return round;
}

template <typename T>
T exchange(unsigned mask, T number, int from) {
  Meeting& warp = warps[current / 32];
  if (unsigned(__builtin_popcount(mask)) != warp.expected) {
    std::fprintf(stderr, "cuda_on_host: a warp operation of %d threads in a warp of %u\n", __builtin_popcount(mask), warp.expected);
    std::abort();
  }
  const unsigned round = meet(warp, &number, sizeof(T));
  T result;
  std::copy_n(warp.numbers[round % 2][from], sizeof(T), reinterpret_cast<unsigned char*>(&result));
  return result;
}

}  // namespace cuda_on_host

inline Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { cuda_on_host::meet(cuda_on_host::block, nullptr, 0); }
inline void __syncwarp(unsigned mask) { cuda_on_host::exchange(mask, 0, 0); }
template <typename T>
T __shfl_xor_sync(unsigned mask, T number, int offset) {
  return cuda_on_host::exchange(mask, number, int(cuda_on_host::current % 32) ^ offset);
}
template <typename T>
T __shfl_sync(unsigned mask, T number, int from) {
  return cuda_on_host::exchange(mask, number, from);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  unsigned bits = 0;
  auto& warp = cuda_on_host::warps[cuda_on_host::current / 32];
  const unsigned number = predicate;
  const unsigned round = cuda_on_host::meet(warp, &number, sizeof(number));
  for (unsigned i = 0; i < warp.expected; ++i) bits |= unsigned(warp.numbers[round % 2][i][0] != 0) << i;
  return bits & mask;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
template <typename T>
void atomicAdd(T* to, T number) {
  *to += number;
}
[[noreturn]] inline void __trap() { std::abort(); }

namespace cuda_on_host {

inline void enter() {
  (*body)();
  threads[current].done = true;
  ++progress;
  give_way();
}

inline void run_block(unsigned count) {
  block.expected = count;
  block.arrived = 0;
  for (unsigned i = 0; i < warps.size(); ++i) {
    warps[i].expected = std::min(32u, count - i * 32);
    warps[i].arrived = 0;
  }
  for (Thread& thread : threads) {
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    makecontext(&thread.context, enter, 0);
  }
  std::vector<unsigned> turns(count);
  for (unsigned i = 0; i < count; ++i) turns[i] = i;
  for (bool left = true; left;) {
    std::shuffle(turns.begin(), turns.end(), order);
    const unsigned long before = progress;
    left = false;
    for (unsigned turn : turns) {
      if (threads[turn].done) continue;
      left = true;
      current = turn;
      threadIdx.x = turn;
      swapcontext(&scheduler, &threads[turn].context);
    }
    if (left && progress == before) {
      std::fprintf(stderr, "cuda_on_host: block %u, %u hangs at a barrier that not all threads reach\n", blockIdx.x, blockIdx.y);
      std::abort();
    }
  }
}

// kernel<<<grid, count, bytes>>>(): `kernel` calls the kernel with its arguments.
inline void launch(Index grid, unsigned count, size_t bytes, const std::function<void()>& kernel) {
  body = &kernel;
  gridDim = grid;
  blockDim = Index{count, 1, 1};
  threads.resize(count);
  warps.assign((count + 31) / 32, Meeting{});
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      shared.assign(bytes, 0xff);  // what is read before it is written is NaN
      run_block(count);
    }
  }
}

}  // namespace cuda_on_host
