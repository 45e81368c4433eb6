/* The C interface of what tokens will probably ask for, and who comes for whom because of it, before a step. */
#ifndef EXPERTD_FORESEE_H
#define EXPERTD_FORESEE_H

#include "expertd_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Logits of a token are map x, [layers * experts]. In each layer its `named` largest count, by softmax among them.
 * `expected` [layers * experts] gets the mean over `tokens` rows of x. `logits` is memory for [tokens, layers * experts].
 * The caller's thread computes, for a few tokens: others take longer to wake. */
EXPERTD_API int expertd_foresee(const expertd_matrix *map, const float *x, int64_t tokens, int32_t layers,
                                int32_t experts, int32_t named, float *logits, float *expected);

/* Held sets, [layers * experts] each. */
typedef struct expertd_held_sets {
  int32_t layers, experts;
  const uint8_t *held;  /* who may go */
  const uint8_t *taken; /* who is held or on the way: nobody else may come */
  const double *scores;
  int32_t least;      /* a layer that holds no more than so many keeps them */
  int32_t candidates; /* to be looked at, the most expected first, equal ones in order */
  double factor;      /* a newcomer is worth more than so many times who goes for it */
} expertd_held_sets;

/* Up to `most` swaps: where in `expected` [layers * experts] the newcomers and those that leave for them lie, and in
 * `found` how many. An expert is worth what is expected of it and its share of its layer's scores; who is worth least
 * goes, of equal ones the first. */
EXPERTD_API int expertd_choose_swaps(const expertd_held_sets *sets, const float *expected, int32_t most,
                                     int64_t *newcomers, int64_t *victims, int32_t *found);

#ifdef __cplusplus
}
#endif
#endif
