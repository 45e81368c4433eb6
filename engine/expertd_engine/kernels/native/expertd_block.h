/* The C interface of one decoder layer: everything of a step but the routed experts.
 *
 * Activations are float32 from the embedding to the logits, whatever the weights are. The caller owns all memory named
 * here and keeps it until the call returns. A layer's experts run between two calls, or with the second: `expertd_block_forward`
 * of layer l first adds what the experts of layer l - 1 gave, and ends with the routes of its own.
 */
#ifndef EXPERTD_BLOCK_H
#define EXPERTD_BLOCK_H

#include "expertd_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

enum expertd_norm_kind { EXPERTD_NORM_NONE = 0, EXPERTD_NORM_RMS = 1, EXPERTD_NORM_LAYER = 2 };

/* HALVES rotates dimension i with i + rotary_dim / 2, PAIRS dimension 2i with 2i + 1. */
enum expertd_rope { EXPERTD_ROPE_NONE = 0, EXPERTD_ROPE_HALVES = 1, EXPERTD_ROPE_PAIRS = 2 };

/* How a router's logits become scores. DENSE: the layer has no routed experts. LOGITS: the caller selects. CHOSEN: the
 * best logits are chosen, and a softmax over these alone gives their weights. GIVEN: there is no router; the caller has
 * put experts and weights into the step. */
enum expertd_scores {
  EXPERTD_SCORES_DENSE = 0,
  EXPERTD_SCORES_LOGITS = 1,
  EXPERTD_SCORES_SOFTMAX = 2, /* over all experts */
  EXPERTD_SCORES_SIGMOID = 3,
  EXPERTD_SCORES_CHOSEN = 4,
  EXPERTD_SCORES_GIVEN = 5
};

typedef struct expertd_norm {
  const float *weight; /* [n] or null */
  const float *bias;   /* [n] or null; LAYER only */
  int32_t kind;
  int32_t length; /* n; for queries and keys either one head or the whole projection */
  float eps;
} expertd_norm;

/* down(act(gate x) * up x); gate.data null: down(act(up x)). up.data null: there is none. */
typedef struct expertd_ffn {
  expertd_matrix gate, up, down;
  int32_t activation;
  float alpha;
  float limit;
} expertd_ffn;

/* Chosen are the top_k experts by score + bias, of equals the lower id first. With `groups` > 1 equal groups of experts,
 * only those of the groups_kept best may be: a group is as good as its group_best highest scores + bias together.
 * An expert's weight is scale times its score, which `shares` divides by the sum of the chosen scores + epsilon. */
typedef struct expertd_router {
  expertd_matrix matrix; /* [experts, hidden] */
  const float *bias;     /* [experts] or null */
  int32_t experts, top_k;
  int32_t scores;
  int32_t groups, groups_kept, group_best;
  int32_t shares;
  float epsilon;
  float scale;
} expertd_router;

/* x = input_norm(h);  a = attention(x);  h += attention_residual * attention_norm(a);  y = ffn_norm(h);  f = ffn(y);
 * h += ffn_residual * output_norm(f). A norm of kind NONE is the identity. With `parallel`, y = x.
 * f is the sum of the routed experts and of `ffn` (a dense layer's own, or what is shared by all tokens), which is
 * multiplied by sigmoid(ffn_gate y) where that exists. */
typedef struct expertd_block {
  expertd_norm input_norm, attention_norm, ffn_norm, output_norm, query_norm, key_norm;
  expertd_matrix query, key, value, output;
  expertd_matrix attention_gate; /* a *= sigmoid(gate x) before `output`; data null: none */
  expertd_matrix ffn_gate;       /* [1, hidden] or data null */
  expertd_router router;
  expertd_ffn ffn;
  const float *cos; /* [positions, rotary_dim / 2]; sin likewise */
  const float *sin;
  const float *sinks; /* [heads] or null */
  int64_t positions;
  int64_t key_offset; /* bytes from a KV block's beginning to this layer's keys [kv_heads][key_dim][block_tokens] */
  int64_t value_offset; /* to its values [kv_heads][block_tokens][value_dim] */
  int64_t window; /* tokens a query sees, itself included; 0: all */
  int32_t hidden, heads, kv_heads, key_dim, value_dim;
  int32_t rope, rotary_dim;
  int32_t norm_after_rope; /* whether query_norm and key_norm follow the rotation */
  int32_t parallel;
  float clip; /* queries, keys and values are held within +-clip; 0: not */
  float scale; /* of attention scores */
  float attention_residual, ffn_residual;
} expertd_block;

/* One step's tokens; `rows` of them, sequence after sequence. */
typedef struct expertd_step {
  int64_t rows;
  const int64_t *positions; /* [rows] */
  int64_t spans;
  const int64_t *span_row;    /* [spans + 1]: rows of span s; its positions are consecutive */
  const int64_t *span_table;  /* [spans]: where its block table begins in `tables` */
  const int32_t *tables;
  char *blocks; /* block 0, which is all zeros */
  int64_t block_stride; /* bytes */
  int32_t block_tokens; /* a multiple of 16 */
  int32_t kv_format;    /* EXPERTD_F32 or EXPERTD_BF16 */
  float *hidden;        /* [rows, hidden]: h */
  float *normed;        /* [rows, hidden]: y, which the experts read */
  float *added;         /* [rows, hidden]: what `ffn` gave */
  float *logits;        /* [rows, experts] */
  int64_t *experts;     /* [rows, top_k] */
  float *weights;       /* [rows, top_k] */
} expertd_step;

/* Bytes of expertd_block and expertd_step, for those who build them without this header. */
EXPERTD_API int64_t expertd_block_bytes(void);
EXPERTD_API int64_t expertd_step_bytes(void);

/* One layer, in one call with the experts of the layer before: `experts` (null: they have run) is computed first, with
 * `routed` for its result. `previous` (null for the first) is the layer before, whose `ffn` output still lies in `added`, and
 * `routed` [rows, hidden] the sum of its experts (null if it has none); read, and left full of zeros for the next sum. */
EXPERTD_API int expertd_block_forward(expertd_pool *pool, const expertd_block *block, const expertd_block *previous,
                                      const expertd_moe_call *experts, float *routed, const expertd_step *step);

/* What the layer after `block` would begin with: after it, `hidden` is the layer's output. */
EXPERTD_API int expertd_block_finish(expertd_pool *pool, const expertd_block *block, const expertd_moe_call *experts,
                                     float *routed, const expertd_step *step);

/* One layer's routes among the experts that it holds. Of the choices that a row lacks, the lightest are replaced for as
 * long as their share of the row's weights stays within its limit (1: all are). Choices that stay keep their weight; what
 * the others weighed is shared by held experts, in proportion to their scores: the best by the router's own rule,
 * `shared_by` for each replaced choice while they are at most three quarters of top_k, and one for each at least; one
 * for each where those replaced are less than an eighth of the row's weight. */
typedef struct expertd_substitution {
  const uint8_t *held; /* [experts]: not 0 for at least top_k of them */
  const float *limits; /* [rows]: of the share that is replaced */
  int32_t shared_by;
  /* Results, row by row. */
  int64_t *experts;  /* [rows, 2 * top_k]: `counts` of them, then the first of them again */
  float *weights;    /* [rows, 2 * top_k]: zeros beyond `counts` */
  int32_t *counts;   /* [rows] */
  int32_t *replaced; /* [rows]: choices */
  float *mass;       /* [rows]: the share that was replaced */
} expertd_substitution;

/* Routes `rows` rows whose router chose `chosen` with `weights` [rows, top_k] by `logits` [rows, experts]. What is neither
 * held nor replaced stays among the experts: it is to be waited for. The router must select natively. */
EXPERTD_API int expertd_substitute(expertd_pool *pool, const expertd_router *router,
                                   const expertd_substitution *substitution, int64_t rows, const float *logits,
                                   const int64_t *chosen, const float *weights);

/* A model's layers and where its experts lie. `slots[l]` has the slot of each expert of layer l, -1 where it is not
 * resident; slots and layouts are null for layers without routed experts. Nobody may change a slot during a call. */
typedef struct expertd_run {
  int32_t layers;
  const expertd_block *const *blocks;
  const expertd_expert_layout *const *layouts;
  const int64_t *const *slots;
  const char *slot_zero;
  int64_t slot_stride;
  float *routed;         /* [rows, hidden], zeros */
  int64_t *chosen;       /* layer l's experts [rows, top_k] are left at chosen + l * chosen_stride */
  int64_t chosen_stride;
  const int64_t *given;  /* null; or experts in the place of layer l's router's: [rows, top_k] at given + l * chosen_stride.
                          * Their weights are those of the router's choices. Not for expertd_run_held */
} expertd_run;

/* Layers from `first` on, each with the experts it chooses, for as long as these are resident. `experts` (may be null)
 * are those of layer first - 1, still to be computed. `reached` is the layer whose experts are not all resident: it has
 * run up to its routes, as after expertd_block_forward; or the number of layers: then all is done, expertd_block_finish
 * included. All layers select natively. */
EXPERTD_API int expertd_run_forward(expertd_pool *pool, const expertd_run *run, int32_t first,
                                    const expertd_moe_call *experts, const expertd_step *step, int32_t *reached);

/* What one layer of a run among held experts is for the books. Results are added to what is there. */
typedef struct expertd_tally {
  const float *norms; /* [experts]: a choice counts for length(y) * weight * norm of its expert */
  double *scores;     /* [experts]: `unit` times what the rows' own choices count for; null: somebody else sums them */
  int64_t *choices;   /* the rows' own */
  int64_t *replaced;  /* of these */
  double *mass;       /* the share that was replaced, summed over rows */
} expertd_tally;

/* What a run leaves of layers that it routes among held experts: by layer, from its own place in each array on. */
typedef struct expertd_held_run {
  const expertd_substitution *layers; /* [layers]; those without routed experts are not read, here and in `tallies` */
  const expertd_tally *tallies;       /* [layers] */
  double unit;
  float *weights; /* layer l's own weights, for `chosen` of the run: [rows, top_k] at weights + l * chosen_stride */
  float *lengths; /* of what its router saw: [rows] at lengths + l * lengths_stride */
  int64_t lengths_stride;
  int64_t *served;       /* [layers, 2]: experts that computed, and the (row, choice) pairs that they computed for */
  int64_t *row_replaced; /* [rows], added to: over layers, the choices that others answered for */
  double *row_mass;      /* [rows], added to: over layers, their share of the row's weights */
} expertd_held_run;

/* expertd_run_forward, but each layer's rows go to held experts, all of them resident. `reached` is also the first layer
 * of which some row must wait for a choice of its own; that layer leaves nothing. During the call others may add to
 * `held` an expert whose record and slot they have written before; layers still to come route among it too. */
EXPERTD_API int expertd_run_held(expertd_pool *pool, const expertd_run *run, const expertd_held_run *held, int32_t first,
                                 const expertd_moe_call *experts, const expertd_step *step, int32_t *reached);

/* scale * head(norm(h)) of `count` rows of hidden [rows, norm->length], to logits [count, head->rows]. */
EXPERTD_API int expertd_block_logits(expertd_pool *pool, const expertd_norm *norm, const expertd_matrix *head,
                                     float scale, const float *hidden, int64_t rows, const int64_t *logit_rows,
                                     int64_t count, float *logits);

#ifdef __cplusplus
}
#endif
#endif
