// From tensors to a Problem: what the CPU and the CUDA entry points share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <limits>
#include <optional>

#include "ms_deform_attn.h"

namespace peft_d2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Types types_of(const Tensor& value, const Tensor& points) {
  const ScalarType v = value.scalar_type(), c = points.scalar_type();
  if (v == ScalarType::Double && c == v) return Types::kDouble;
  if (v == ScalarType::Float && c == v) return Types::kFloat;
  if (v == ScalarType::BFloat16 && c == v) return Types::kBFloat16;
  if (v == ScalarType::BFloat16 && c == ScalarType::Float) return Types::kBFloat16Float;
  if (v == ScalarType::Half && c == v) return Types::kHalf;
  if (v == ScalarType::Half && c == ScalarType::Float) return Types::kHalfFloat;
  STD_TORCH_CHECK(
      false, "ms_deform_attn: points should have value's type, or float32 where value is bfloat16 or float16");
}

inline ScalarType accumulation_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Whether the product of sizes is at most `limit`; computed without overflow. An empty dimension counts as one, so that
// products of some of the sizes are as safe.
inline bool product_within(int64_t limit, std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes) limit /= std::max<int64_t>(size, 1);
  return limit > 0;
}

// torch's own looks its operator up by name, even where there is nothing to do.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// An uninitialised, contiguous tensor; for the same reason not torch's own.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  std::array<int64_t, 6> strides{};
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  int32_t device = 0, index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, device, index, &made));
  return Tensor(made);
}
inline Tensor new_tensor(const Tensor& like) { return new_tensor(like, like.sizes(), like.scalar_type()); }

// The contiguous inputs of one call, kept alive, and the Problem that points into them.
struct Inputs {
  Tensor value, spatial_shapes, level_start_index, points, weights;
  std::optional<Tensor> reference;
  Problem problem{};
  Types types;

  Inputs(
      const Tensor& value_, const Tensor& shapes, const Tensor& starts, const std::optional<Tensor>& reference_,
      const Tensor& points_, const Tensor& weights_)
      : value(as_contiguous(value_)), spatial_shapes(as_contiguous(shapes)), level_start_index(as_contiguous(starts)),
        points(as_contiguous(points_)), weights(as_contiguous(weights_)), types(types_of(value_, points_)) {
    STD_TORCH_CHECK(
        value.dim() == 4 && points.dim() == 6, "ms_deform_attn: value should be (N, S, M, D) and points (N, Q, M, L, P, 2)");
    Problem& p = problem;
    p.n = value.size(0), p.s = value.size(1), p.heads = value.size(2), p.channels = value.size(3);
    p.queries = points.size(1), p.levels = points.size(3), p.points = points.size(4);
    const bool fits = points.size(0) == p.n && points.size(2) == p.heads && points.size(5) == 2;
    STD_TORCH_CHECK(fits, "ms_deform_attn: points should be (N, Q, M, L, P, 2) with value's N and M");
    check_sizes();
    STD_TORCH_CHECK(
        weights.numel() == p.n * p.queries * p.heads * p.levels * p.points &&
            weights.scalar_type() == points.scalar_type(),
        "ms_deform_attn: weights should have points' type and one number for each point");
    STD_TORCH_CHECK(
        spatial_shapes.numel() == 2 * p.levels && level_start_index.numel() == p.levels &&
            spatial_shapes.scalar_type() == ScalarType::Long && level_start_index.scalar_type() == ScalarType::Long,
        "ms_deform_attn: spatial_shapes should be int64 (L, 2) and level_start_index int64 (L,), with points' L");
    for (const Tensor* tensor : {&spatial_shapes, &level_start_index, &points, &weights}) check_device(*tensor);
    if (reference_) set_reference(*reference_);
    p.spatial_shapes = static_cast<const int64_t*>(spatial_shapes.data_ptr());
    p.level_start_index = static_cast<const int64_t*>(level_start_index.data_ptr());
    p.value = value.data_ptr();
    p.raw = points.data_ptr();
    p.weights = weights.data_ptr();
  }

  // Without points or rows to sample every result is zero, and no kernel runs.
  bool empty() const { return value.numel() == 0 || points.numel() == 0; }

  Tensor new_output() const {
    const Problem& p = problem;
    return new_tensor(value, std::array<int64_t, 3>{p.n, p.queries, p.heads * p.channels}, value.scalar_type());
  }

  Tensor new_reference_gradient(bool wanted) const {
    const Problem& p = problem;
    const std::array<int64_t, 5> sizes{p.n, p.queries, p.heads, p.levels, p.reference_size};
    const std::array<int64_t, 1> none{0};
    return wanted ? new_tensor(value, sizes, accumulation_type(value))
                  : new_tensor(value, none, accumulation_type(value));
  }

 private:
  // What 32-bit rows, levels and strides, and 64-bit offsets in bytes, can count.
  void check_sizes() const {
    const Problem& p = problem;
    constexpr int64_t rows = std::numeric_limits<int32_t>::max(), bytes = std::numeric_limits<int64_t>::max() / 16;
    STD_TORCH_CHECK(
        p.s <= rows && p.queries <= rows, "ms_deform_attn: value has S = ", p.s, " rows and points have Q = ", p.queries,
        " queries; at most 2^31 - 1 are possible");
    const bool fit = product_within(rows, {p.heads, p.channels}) && product_within(rows / 64, {p.levels, p.points}) &&
                     product_within(bytes, {p.n, p.s, p.heads, p.channels}) &&
                     product_within(bytes, {p.n, p.queries, p.heads, p.channels}) &&
                     product_within(bytes, {p.n, p.queries, p.heads, p.levels, p.points, 4});
    STD_TORCH_CHECK(fit, "ms_deform_attn: the tensors are too large; M * D and L * P should be smaller");
  }

  void check_device(const Tensor& tensor) const {
    STD_TORCH_CHECK(
        tensor.is_cpu() == value.is_cpu() && tensor.get_device_index() == value.get_device_index(),
        "ms_deform_attn: all tensors should be on value's device");
  }

  void set_reference(const Tensor& tensor) {
    reference = as_contiguous(tensor);
    check_device(*reference);
    Problem& p = problem;
    p.reference_size = tensor.dim() == 4 ? tensor.size(3) : 0;
    STD_TORCH_CHECK(
        (p.reference_size == 2 || p.reference_size == 4) && tensor.numel() == p.n * p.queries * p.levels * p.reference_size &&
            tensor.scalar_type() == accumulation_type(value),
        "ms_deform_attn: reference_points should be (N, Q, L, 2) or (N, Q, L, 4), float64 for float64 values, else float32");
    p.reference = reference->data_ptr();
  }
};

}  // namespace peft_d2
