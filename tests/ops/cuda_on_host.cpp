// The CUDA kernels' bodies, compiled for the host and callable by ctypes. Compiled by test_cuda_on_host.py.
#include <algorithm>

#include "cuda_on_host.h"
// The kernels come after what they use.
#include "../../csrc/cuda/backward.cuh"
#include "../../csrc/cuda/forward.cuh"

using namespace peft_d2;

namespace {

template <typename T, typename C, int VECTOR>
void forward(const Problem& p, void* output, unsigned blocks) {
  const Plan plan = make_plan(p, VECTOR, sizeof(ForwardPoint<Accumulator<T>>), 256);
  const Index grid{blocks ? blocks : unsigned(plan.blocks), unsigned(plan.heads), 1};
  cuda_on_host::launch(grid, unsigned(plan.threads()), size_t(plan.shared_bytes), [&] {
    forward_kernel<T, C, VECTOR>(p, plan, static_cast<T*>(output));
  });
}

template <typename T, typename C, int VECTOR, bool ONCE>
void backward(const Problem& p, const Outputs<T, C>& to, unsigned blocks) {
  const Plan plan = make_plan(p, VECTOR, sizeof(BackwardPoint<Accumulator<T>>), 128);
  const Index grid{blocks ? blocks : unsigned(plan.blocks), unsigned(plan.heads), 1};
  cuda_on_host::launch(grid, unsigned(plan.threads()), size_t(plan.shared_bytes), [&] {
    backward_kernel<T, C, VECTOR, ONCE>(p, plan, to);
  });
}

template <typename T, typename C>
void value_gradient(const Problem& p, const Outputs<T, C>& from, Accumulator<T>* to, unsigned blocks) {
  const Plan plan = make_plan(p, 1, 0, 128);
  const Index grid{blocks ? blocks : 3u, unsigned(plan.heads), 1};
  cuda_on_host::launch(grid, 128, size_t(plan.level_bytes), [&] { value_gradient_kernel<T, C>(p, plan, from, to); });
}

}  // namespace

extern "C" {

// sizes: N, S, M, D, Q, L, P, numbers of a reference point. inputs: spatial_shapes, level_start_index, value, reference,
// points, weights. types as in the enumeration. vectors: whether channels are read 16 bytes at a time. blocks: of the grid,
// 0 for as many as on a device.
void run_forward(const int64_t* sizes, void** inputs, void* output, int types, bool vectors, unsigned blocks);
void run_backward(
    const int64_t* sizes, void** inputs, void** outputs, int types, bool vectors, bool deterministic, unsigned blocks);
}

static Problem problem_of(const int64_t* sizes, void** inputs) {
  return Problem{
      sizes[0],  sizes[1],  sizes[2],  sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], static_cast<int64_t*>(inputs[0]),
      static_cast<int64_t*>(inputs[1]), inputs[2], inputs[3], inputs[4], inputs[5], false};
}

void run_forward(const int64_t* sizes, void** inputs, void* output, int types, bool vectors, unsigned blocks) {
  const Problem p = problem_of(sizes, inputs);
  visit(Types(types), [&](auto pair) {
    using T = typename decltype(pair)::Value;
    using C = typename decltype(pair)::Coordinate;
    if (vectors) {
      forward<T, C, 16 / int(sizeof(T))>(p, output, blocks);
    } else {
      forward<T, C, 1>(p, output, blocks);
    }
  });
}

// outputs: grad_output (read), value and reference in the accumulation type, points, weights, attention (for deterministic).
void run_backward(
    const int64_t* sizes, void** inputs, void** outputs, int types, bool vectors, bool deterministic, unsigned blocks) {
  const Problem p = problem_of(sizes, inputs);
  visit(Types(types), [&](auto pair) {
    using T = typename decltype(pair)::Value;
    using C = typename decltype(pair)::Coordinate;
    using A = Accumulator<T>;
    A* sums = static_cast<A*>(outputs[1]);
    const Outputs<T, C> to{
        static_cast<const T*>(outputs[0]),
        deterministic ? nullptr : sums,
        static_cast<C*>(outputs[3]),
        static_cast<C*>(outputs[4]),
        p.reference_size ? static_cast<A*>(outputs[2]) : nullptr,
        deterministic ? static_cast<A*>(outputs[5]) : nullptr};
    if (vectors) {
      backward<T, C, 16 / int(sizeof(T)), true>(p, to, blocks);
    } else {
      backward<T, C, 1, false>(p, to, blocks);
    }
    if (deterministic) value_gradient<T, C>(p, to, sums, blocks);
  });
}
