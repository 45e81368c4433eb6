/* The C interface of a pre-gating router: tokens to experts in one call, before any layer runs. */
#ifndef EXPERTD_PREGATE_H
#define EXPERTD_PREGATE_H

#include "expertd_block.h"

#ifdef __cplusplus
extern "C" {
#endif

/* h = entry entry_norm(embedding of the token); h = block(h); logits = head head_norm(h), for each of `heads` choices
 * those of router.experts experts, of which `router` (its matrix is not read) chooses top_k. */
typedef struct expertd_pregate {
  expertd_matrix embedding; /* [vocabulary, e] */
  expertd_norm entry_norm;  /* [e] */
  expertd_matrix entry;     /* [block.hidden, e] */
  expertd_block block;      /* DENSE */
  expertd_norm head_norm;   /* [block.hidden] */
  expertd_matrix head;      /* [heads * router.experts, block.hidden] */
  expertd_router router;
  int32_t heads;
} expertd_pregate;

/* For those who build it without this header. */
EXPERTD_API int64_t expertd_pregate_bytes(void);

/* Routes `tokens` [step->rows], whose keys and values go into the step's blocks. Of the step's memory
 * `logits` alone is used, [rows, heads * experts] or null. Experts and weights are [rows, heads, top_k]. */
EXPERTD_API int expertd_pregate_forward(expertd_pool *pool, const expertd_pregate *pregate, const int64_t *tokens,
                                        const expertd_step *step, int64_t *experts, float *weights);

/* A thread that routes beside its caller. `begin` is expertd_pregate_forward, but returns at once, and is refused while
 * a call is under way; all that it is given must stay as it is until `end`, which waits or makes the call itself, and returns its
 * code; EXPERTD_OK where there was none. `destroy` waits too, and gives up a call that has not begun. */
typedef struct expertd_pregate_thread expertd_pregate_thread;
EXPERTD_API int expertd_pregate_thread_create(expertd_pregate_thread **thread);
EXPERTD_API int expertd_pregate_thread_destroy(expertd_pregate_thread *thread);
EXPERTD_API int expertd_pregate_begin(expertd_pregate_thread *thread, const expertd_pregate *pregate,
                                      const int64_t *tokens, const expertd_step *step, int64_t *experts,
                                      float *weights);
EXPERTD_API int expertd_pregate_end(expertd_pregate_thread *thread);

#ifdef __cplusplus
}
#endif
#endif
