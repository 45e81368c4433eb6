// A decoder layer's kernels in AVX2 with FMA.
#if defined(__x86_64__)

#include "block_kernels.h"
#include "target.h"
EXPERTD_TARGET_BEGIN("avx2,fma,f16c")

#include "lanes_avx2.h"

#define EXPERTD_QUERY_ROWS 3
#define EXPERTD_KEY_LANES 2
#include "block_table.h"

EXPERTD_TARGET_END

EXPERTD_BLOCK_KERNELS(block_avx2);

#endif
