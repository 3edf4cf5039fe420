// The operator on the CPU: checks, the choice of an instruction set, threads.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string_view>
#include <tuple>

#include "../tensors.h"
#include "kernels.h"

namespace peft_d2 {
namespace {

// Wider is not always faster: 32-bit rows keep AVX2 busy enough, 16-bit rows gain from AVX-512's conversions.
// PEFT_D2_CPU_KERNELS, for tests, asks for plain, avx2 or avx512; what the processor lacks is not used.
const Kernels& kernels_for(Types types) {
#if defined(PEFT_D2_X86)
  static const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool wide = types != Types::kDouble && types != Types::kFloat;
  const char* forced = std::getenv("PEFT_D2_CPU_KERNELS");
  const std::string_view choice = forced ? forced : "";
  if (choice == "plain") return kernels_plain;
  if (avx512 && (choice == "avx512" || (choice.empty() && wide))) return kernels_avx512;
  if (avx2) return kernels_avx2;
#endif
  return kernels_plain;
}

// Wrong levels would read outside value.
void check_levels(const Problem& p) {
  int64_t end = 0;
  for (int64_t level = 0; level < p.levels; ++level) {
    const int64_t height = p.spatial_shapes[2 * level], width = p.spatial_shapes[2 * level + 1];
    const int64_t start = p.level_start_index[level];
    STD_TORCH_CHECK(
        level_fits(height, width, start, p.s) && start == end,
        "ms_deform_attn: level ", level, " is ", height, " x ", width, " in spatial_shapes and begins at row ", start,
        " in level_start_index; it should begin at row ", end, " and lie within value's S = ", p.s, " rows");
    end += height * width;
  }
  STD_TORCH_CHECK(
      end == p.s, "ms_deform_attn: the levels of spatial_shapes have ", end, " pixels; they should fill value's S = ", p.s,
      " rows");
}

// Packing reads and writes each row once more, which pays when rows are visited several times. A thread then holds two
// heads' worth of rows, its copy of value and the gradient: all threads together no more than the gradient of value.
bool packing_pays(const Problem& p) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), p.n * p.heads);
  return p.queries * p.levels * p.points >= 2 * p.s && 2 * threads <= p.n * p.heads;
}

// Runs body(scratch, begin, end) over [0, count) on torch's threads.
template <typename Body>
void parallel(int64_t count, int64_t grain, size_t scratch_bytes, Body body) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> memory(new char[scratch_bytes + 64]);
    void* aligned = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64;
    body(aligned, begin, end);
  });
}

Tensor forward(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const std::optional<Tensor>& reference_points, const Tensor& points, const Tensor& weights) {
  const Inputs inputs(value, spatial_shapes, level_start_index, reference_points, points, weights);
  const Problem& p = inputs.problem;
  check_levels(p);
  Tensor output = inputs.new_output();
  if (inputs.empty()) return torch::stable::zero_(output);
  const Kernels& kernels = kernels_for(inputs.types);
  const int64_t work = std::max<int64_t>(1, p.heads * p.levels * p.points * (p.channels + 32));
  parallel(
      p.n * p.queries, 1 + 50000 / work, kernels.scratch_bytes(inputs.types, p, false),
      [&](void* scratch, int64_t begin, int64_t end) {
        kernels.forward(inputs.types, p, output.data_ptr(), scratch, begin, end);
      });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
    const std::optional<Tensor>& reference_points, const Tensor& points, const Tensor& weights, bool reference_grad,
    bool /* always deterministic */) {
  Inputs inputs(value, spatial_shapes, level_start_index, reference_points, points, weights);
  const Problem& p = inputs.problem;
  inputs.problem.pack_value = packing_pays(p);
  check_levels(p);
  const Tensor grad = as_contiguous(grad_output);
  STD_TORCH_CHECK(
      grad.numel() == p.n * p.queries * p.heads * p.channels && grad.scalar_type() == inputs.value.scalar_type(),
      "ms_deform_attn: grad_output should be (N, Q, M*D) of value's type");
  Tensor grad_value = new_tensor(inputs.value);
  Tensor grad_points = new_tensor(inputs.points);
  Tensor grad_weights = new_tensor(inputs.weights);
  const bool with_reference = reference_grad && p.reference_size;
  Tensor grad_reference = inputs.new_reference_gradient(with_reference);
  const Gradients gradients{
      grad.data_ptr(), grad_value.data_ptr(), grad_points.data_ptr(), grad_weights.data_ptr(),
      with_reference ? grad_reference.data_ptr() : nullptr};
  if (inputs.empty()) {
    for (Tensor* tensor : {&grad_value, &grad_points, &grad_weights, &grad_reference}) torch::stable::zero_(*tensor);
  } else {
    const Kernels& kernels = kernels_for(inputs.types);
    parallel(
        p.n * p.heads, 1, kernels.scratch_bytes(inputs.types, p, true), [&](void* scratch, int64_t begin, int64_t end) {
          kernels.backward(inputs.types, p, gradients, scratch, begin, end);
        });
  }
  if (with_reference) {
    const int64_t heads = 2;
    grad_reference = torch::stable::sum(grad_reference, torch::headeronly::IntHeaderOnlyArrayRef(&heads, 1));
  }
  return {grad_value, grad_points, grad_weights, grad_reference};
}

}  // namespace
}  // namespace peft_d2

STABLE_TORCH_LIBRARY_IMPL(peft_d2, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&peft_d2::forward));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&peft_d2::backward));
}
