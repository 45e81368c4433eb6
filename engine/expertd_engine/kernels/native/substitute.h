// Who answers for the choices of a row that its layer does not hold, on arguments that have been checked.
#pragma once

#include "expertd_block.h"
#include "pool.h"

namespace expertd {

// Throws Refused.
void check_substitution(const expertd_router& router, const expertd_substitution& substitution, int64_t rows);

// False if some row must wait for a choice of its own; all results are there either way.
bool substitute(Pool& pool, const expertd_router& router, const expertd_substitution& substitution, int64_t rows,
                const float* logits, const int64_t* chosen, const float* weights);

}  // namespace expertd
