// The operator's schemas. Implementations register themselves from cpu/ and cuda/; shapes for tracing, gradients and
// autocast are Python's (peft_d2/ops/library.py).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(peft_d2, m) {
  // Without reference points: points are sampling locations (N, Q, M, L, P, 2), weights are attention weights (N, Q, M, L, P).
  // With: points are sampling offsets, weights are logits, softmax and locations happen inside.
  m.def(
      "ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor? reference_points, "
      "Tensor points, Tensor weights) -> Tensor");
  // Gradients of value, points, weights and reference points; the last is empty unless asked for.
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor? reference_points, Tensor points, Tensor weights, bool reference_grad, bool deterministic) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}
