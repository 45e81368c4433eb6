// A decoder layer's kernels on any processor.
#include "lanes_portable.h"

#define EXPERTD_QUERY_ROWS 1
#define EXPERTD_KEY_LANES 2
#include "block_table.h"

EXPERTD_BLOCK_KERNELS(block_portable);
