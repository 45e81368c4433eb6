// A decoder layer's kernels for 64-bit ARM.
#if defined(__aarch64__)

#include "block_kernels.h"
#include "target.h"
#include "lanes_neon.h"

#define EXPERTD_QUERY_ROWS 3
#define EXPERTD_KEY_LANES 2
#include "block_table.h"

EXPERTD_BLOCK_KERNELS(block_neon);

#endif
