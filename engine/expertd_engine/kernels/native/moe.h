// The routed experts of a layer, for whoever runs them inside a call of its own.
#pragma once

#include "expertd_kernels.h"
#include "pool.h"

namespace expertd {

// `cuts`, for each expert or null: only its inner neurons from cuts[e] on count, a multiple of kCutColumns; where that is
// not 0, somebody else adds the sums of those before, and the bias of down. Records then lie as GPUs read them.
void check_moe(const expertd_moe_call& experts, const int32_t* cuts = nullptr);  // throws Refused
void run_moe(Pool& pool, const expertd_moe_call& experts, const int32_t* cuts = nullptr);

}  // namespace expertd
