// The compiled bodies, once for each instruction set, and how they are chosen and fed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../ms_deform_attn.h"

namespace peft_d2 {

struct Kernels {
  // Output rows [begin, end) of N * Q.
  void (*forward)(Types, const Problem&, void* output, void* scratch, int64_t begin, int64_t end);
  // Gradients of heads [begin, end) of N * M; no two heads share anything that is written.
  void (*backward)(Types, const Problem&, const Gradients&, void* scratch, int64_t begin, int64_t end);
  // Bytes of scratch for one call of either.
  size_t (*scratch_bytes)(Types, const Problem&, bool backward);
};

extern const Kernels kernels_plain;
#if defined(PEFT_D2_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace peft_d2
