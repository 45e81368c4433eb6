// The parts of a step that the C interface in block_api.cpp offers, on arguments that it has checked.
#pragma once

#include "expertd_block.h"
#include "pool.h"

namespace expertd {

// Both throw Refused.
void check_block(const expertd_block* block);
void check_step(const expertd_step* step, const expertd_block& block);

void layer_forward(Pool& pool, const expertd_block& block, const expertd_block* previous, float* routed,
                   const expertd_step& step);
void layer_finish(Pool& pool, const expertd_block& block, float* routed, const expertd_step& step);
void head_logits(Pool& pool, const expertd_norm& norm, const expertd_matrix& head, float scale, const float* hidden,
                 const int64_t* rows, int64_t count, float* logits);

}  // namespace expertd
