// The operator on CUDA devices: checks, plans, launches.
#include <torch/csrc/stable/accelerator.h>

#include <cstdio>
#include <tuple>

#include "../tensors.h"
#include "backward.cuh"
#include "forward.cuh"

namespace peft_d2 {
namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "ms_deform_attn: ", cudaGetErrorString(error));
}

dim3 grid(const Plan& plan, int64_t blocks) {
  STD_TORCH_CHECK(
      plan.shared_bytes <= kSharedBytes, "ms_deform_attn: too many points a query for the GPU's shared memory; ",
      "L * P should be at most ", kSharedBytes / 100, " (backend=\"torch\" has no such limit)");
  return dim3(unsigned(blocks), unsigned(plan.heads < 65535 ? plan.heads : 65535));
}

// Whether rows of `channels` numbers of T can be read 16 bytes at a time.
template <typename T>
bool aligned(const Problem& p, const void* a, const void* b) {
  return p.channels * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(a) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(b) % 16 == 0;
}

template <typename T, typename C, int VECTOR>
void launch_forward(const Problem& p, T* output, cudaStream_t stream) {
  const Plan plan = make_plan(p, VECTOR, sizeof(ForwardPoint<Accumulator<T>>), 256);
  forward_kernel<T, C, VECTOR><<<grid(plan, plan.blocks), plan.threads(), plan.shared_bytes, stream>>>(p, plan, output);
}

Tensor forward(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const std::optional<Tensor>& reference_points, const Tensor& points, const Tensor& weights) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Inputs inputs(value, spatial_shapes, level_start_index, reference_points, points, weights);
  const Problem& p = inputs.problem;
  Tensor output = inputs.new_output();
  if (inputs.empty() || output.numel() == 0) return torch::stable::zero_(output);
  visit(inputs.types, [&](auto pair) {
    using T = typename decltype(pair)::Value;
    using C = typename decltype(pair)::Coordinate;
    T* to = static_cast<T*>(output.data_ptr());
    if (aligned<T>(p, p.value, to)) {
      launch_forward<T, C, 16 / int(sizeof(T))>(p, to, current_stream(value));
    } else {
      launch_forward<T, C, 1>(p, to, current_stream(value));
    }
  });
  check_launch();
  return output;
}

template <typename T, typename C, int VECTOR, bool ONCE>
void launch_backward(const Problem& p, const Outputs<T, C>& to, cudaStream_t stream) {
  const Plan plan = make_plan(p, VECTOR, sizeof(BackwardPoint<Accumulator<T>>), 128);
  backward_kernel<T, C, VECTOR, ONCE>
      <<<grid(plan, plan.blocks), plan.threads(), plan.shared_bytes, stream>>>(p, plan, to);
}

template <typename T, typename C>
void launch_value_gradient(const Problem& p, const Outputs<T, C>& from, Accumulator<T>* to, cudaStream_t stream) {
  const Plan plan = make_plan(p, 1, 0, 128);
  // At most as many lines as rows of value; warps without one have nothing to do.
  const int64_t blocks = p.s / 4 + 1 < 1024 ? p.s / 4 + 1 : 1024;
  value_gradient_kernel<T, C><<<grid(plan, blocks), 128, plan.level_bytes, stream>>>(p, plan, from, to);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const std::optional<Tensor>& reference_points, const Tensor& points, const Tensor& weights, bool reference_grad,
    bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Inputs inputs(value, spatial_shapes, level_start_index, reference_points, points, weights);
  const Problem& p = inputs.problem;
  const Tensor grad = as_contiguous(grad_output);
  STD_TORCH_CHECK(
      grad.numel() == p.n * p.queries * p.heads * p.channels && grad.scalar_type() == inputs.value.scalar_type(),
      "ms_deform_attn: grad_output should be (N, Q, M*D) of value's type");
  Tensor grad_value = torch::stable::new_zeros(inputs.value, inputs.value.sizes(), accumulation_type(value));
  Tensor grad_points = new_tensor(inputs.points);
  Tensor grad_weights = new_tensor(inputs.weights);
  const bool with_reference = reference_grad && p.reference_size;
  Tensor grad_reference = inputs.new_reference_gradient(with_reference);
  std::optional<Tensor> attention;
  if (deterministic) attention = new_tensor(inputs.weights, inputs.weights.sizes(), accumulation_type(value));
  if (inputs.empty()) {
    for (Tensor* tensor : {&grad_points, &grad_weights, &grad_reference}) torch::stable::zero_(*tensor);
  } else {
    visit(inputs.types, [&](auto pair) {
      using T = typename decltype(pair)::Value;
      using C = typename decltype(pair)::Coordinate;
      using A = Accumulator<T>;
      // 16 bytes of the sums, as neighbouring threads then add to whole sectors of memory.
      constexpr int vector = 16 / int(sizeof(A));
      A* sums = static_cast<A*>(grad_value.data_ptr());
      const Outputs<T, C> to{
          static_cast<const T*>(grad.data_ptr()),
          deterministic ? nullptr : sums,
          static_cast<C*>(grad_points.data_ptr()),
          static_cast<C*>(grad_weights.data_ptr()),
          with_reference ? static_cast<A*>(grad_reference.data_ptr()) : nullptr,
          deterministic ? static_cast<A*>(attention->data_ptr()) : nullptr};
      if (aligned<T>(p, p.value, grad.data_ptr()) && p.channels <= 32 * vector) {
        launch_backward<T, C, vector, true>(p, to, current_stream(value));
      } else {
        launch_backward<T, C, 1, false>(p, to, current_stream(value));
      }
      check_launch();
      if (deterministic) launch_value_gradient<T, C>(p, to, sums, current_stream(value));
      check_launch();
    });
  }
  if (with_reference) {
    const int64_t heads = 2;
    grad_reference = torch::stable::sum(grad_reference, torch::headeronly::IntHeaderOnlyArrayRef(&heads, 1));
  }
  return {torch::stable::to(grad_value, value.scalar_type()), grad_points, grad_weights, grad_reference};
}

}  // namespace
}  // namespace peft_d2

STABLE_TORCH_LIBRARY_IMPL(peft_d2, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&peft_d2::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&peft_d2::backward));
}
