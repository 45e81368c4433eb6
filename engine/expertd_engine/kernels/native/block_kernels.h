// What a decoder layer needs beside matrix products, as one table per instruction set.
#pragma once

#include <cstdint>

#include "attention.h"
#include "expertd_block.h"

namespace expertd {

struct BlockKernels {
  // One run of norm.length numbers; `out` may be `x`.
  void (*norm)(const expertd_norm& norm, const float* x, float* out);
  // One head at a position whose angles are `cos`, `sin` [rotary_dim / 2], in place.
  void (*rotate)(int32_t rope, int32_t rotary_dim, const float* cos, const float* sin, float* x);
  // x[i] *= sigmoid(gate[i])
  void (*gate)(const float* gate, int64_t count, float* x);
  // A token's logits [experts] to its top_k experts and weights; `scratch` [select_scratch(router)]. Only experts whose
  // `allowed` is not 0 are chosen, at least top_k of them; null: all may be.
  void (*select)(const expertd_router& router, const float* logits, const uint8_t* allowed, float* scratch,
                 int64_t* chosen, float* weights);
  void (*attend_f32)(const AttentionWork& work);
  void (*attend_bf16)(const AttentionWork& work);
  // A token's key or value head into its block: `count` numbers, `stride` numbers apart.
  void (*write_f32)(const float* from, int64_t count, int64_t stride, void* to);
  void (*write_bf16)(const float* from, int64_t count, int64_t stride, void* to);
};

inline int64_t select_scratch(const expertd_router& router) { return 3 * int64_t(router.experts) + router.groups; }

extern const BlockKernels block_portable;
#if defined(__x86_64__)
extern const BlockKernels block_avx2, block_avx512;
#elif defined(__aarch64__)
extern const BlockKernels block_neon;
#endif

// Those of the instruction set in use.
const BlockKernels& block_kernels();

}  // namespace expertd
