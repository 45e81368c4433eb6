/* Experts computed by the processor while a GPU's step runs: a thread of its own that answers requests which the GPU
 * writes into memory that both see. Neither side calls the other: a request and its answer are numbers that change.
 */
#ifndef EXPERTD_HOST_H
#define EXPERTD_HOST_H

#include "expertd_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct expertd_host expertd_host;

/* Memory that the GPU and the processor see. A request is complete once `posted` has its number, which is one more than
 * the last one's. It is answered once that number stands in the high half of each of its `sums`, which are written once;
 * and then `done` has it. Between the two its fields stay as they are. */
typedef struct expertd_mailbox {
  int32_t *posted;
  int32_t *done;
  const int32_t *head;    /* [3]: MoE layer, rows, experts asked for */
  const int32_t *experts; /* [max_experts], ascending */
  const int32_t *begin;   /* [max_experts]: expert i serves pairs[begin[i]] to pairs[end[i] - 1] */
  const int32_t *end;
  const int32_t *cuts;    /* [max_experts]: of expert i, inner neurons from cuts[i] on are asked for; 0: all are. Where
                           * not all are, the GPU adds what the others give, and the bias of down */
  const int32_t *pairs;   /* [max_rows * top_k]: row * top_k + choice */
  const float *x;         /* [rows, hidden] */
  const float *weights;   /* [rows, top_k] */
  uint64_t *sums;         /* [rows, hidden]: the answer; in the low half each row's weighted sum, a float */
  int32_t max_rows;
  int32_t max_experts;
  int32_t top_k;
} expertd_mailbox;

typedef struct expertd_host_layer {
  expertd_expert_layout layout;
  const void *const *records; /* [experts]; null: there is none, and a request for it fails */
  int64_t record_bytes;
  int32_t experts;
} expertd_host_layer;

/* Since creation. */
typedef struct expertd_host_counts {
  int64_t requests;
  int64_t experts;
  int64_t bytes;       /* of their records, or of the part that is asked for */
  int64_t nanoseconds; /* from request to answer, summed */
} expertd_host_counts;

EXPERTD_API int64_t expertd_host_layer_bytes(void); /* sizeof, for who binds it; and so is the next */
EXPERTD_API int64_t expertd_mailbox_bytes(void);

/* `threads` compute, the one that watches included; they are parked but between begin and end. The layers are copied,
 * what the mailbox and the layers point to must outlive the host. */
EXPERTD_API int expertd_host_create(int32_t threads, const expertd_host_layer *layers, int32_t count,
                                    const expertd_mailbox *mailbox, expertd_host **host);
EXPERTD_API int expertd_host_destroy(expertd_host *host);

/* From now on requests are looked for and answered; until `end`, which is called when all have been answered. */
EXPERTD_API int expertd_host_begin(expertd_host *host);

/* Park. Fails, with its text, as the first request since the last call that failed: each is answered all the same, with
 * sums that mean nothing, so that nobody waits for ever. */
EXPERTD_API int expertd_host_end(expertd_host *host, expertd_host_counts *counts);

/* As `end`, but it goes on: requests of a GPU's next step may be there already. */
EXPERTD_API int expertd_host_look(expertd_host *host, expertd_host_counts *counts);

#ifdef __cplusplus
}
#endif
#endif
