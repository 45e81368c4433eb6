// A decoder layer's kernels in AVX-512.
#if defined(__x86_64__)

#include "block_kernels.h"
#include "target.h"
EXPERTD_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

#include "lanes_avx512.h"

#define EXPERTD_QUERY_ROWS 6
#define EXPERTD_KEY_LANES 4
#include "block_table.h"

EXPERTD_TARGET_END

EXPERTD_BLOCK_KERNELS(block_avx512);

#endif
