/* The C interface of what tokens will probably ask for, and which of it is lacking, before a step. */
#ifndef EXPERTD_FORESEE_H
#define EXPERTD_FORESEE_H

#include "expertd_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Logits of a token are map x, [layers * experts]. In each layer its `named` largest count, by softmax among them.
 * `expected` [layers * experts] gets the mean over `tokens` rows of x. `wanted` [most] gets where in it those lie that
 * are not `held` [layers * experts] (bytes) and expected at all, the most expected first, equal ones in order; `found`
 * how many. `logits` is memory for [tokens, layers * experts]. The caller's thread computes, for a few tokens: others
 * take longer to wake. */
EXPERTD_API int expertd_foresee(const expertd_matrix *map, const float *x, int64_t tokens, int32_t layers,
                                int32_t experts, int32_t named, const uint8_t *held, int32_t most, float *logits,
                                float *expected, int64_t *wanted, int32_t *found);

#ifdef __cplusplus
}
#endif
#endif
