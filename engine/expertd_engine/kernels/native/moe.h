// The routed experts of a layer, for whoever runs them inside a call of its own.
#pragma once

#include "expertd_kernels.h"
#include "pool.h"

namespace expertd {

void check_moe(const expertd_moe_call& experts);  // throws Refused
void run_moe(Pool& pool, const expertd_moe_call& experts);

}  // namespace expertd
