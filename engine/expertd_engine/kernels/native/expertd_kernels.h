/* The stable C interface of expertd's CPU kernels: what Python binds and other programs may link.
 *
 * Every function that returns int returns EXPERTD_OK or an error code, with the text in expertd_error(). None aborts.
 * All instruction sets, thread counts and batch shapes give the same bits: a row of a result depends on the weights and
 * on that row of the input alone.
 */
#ifndef EXPERTD_KERNELS_H
#define EXPERTD_KERNELS_H

#include <stdint.h>

#if defined(__GNUC__)
#define EXPERTD_API __attribute__((visibility("default")))
#else
#define EXPERTD_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define EXPERTD_ABI_VERSION 5

enum expertd_status {
  EXPERTD_OK = 0,
  EXPERTD_INVALID = 1,    /* an argument that is refused */
  EXPERTD_NO_MEMORY = 2,  /* scratch memory or a thread could not be had */
  EXPERTD_BUSY = 3        /* the pool is inside another call */
};

/* How a matrix W of `rows` x `cols` lies in memory.
 *
 * F32, BF16: row after row, no padding.
 * INT8, INT4, INT4S: strips of 16 rows, groups of 32 columns, both padded with zeros; each strip is contiguous, at a
 * multiple of 64 bytes: DATA, then SCALES (groups x 16 float16), then for INT4 MINS (the same again).
 *   INT8   DATA [group][8][16 rows][4 columns] bytes q + 128, q in -127..127;          value d * q
 *   INT4S  DATA [group][4][16 rows][4] bytes, low nibble q of column 4j + i,
 *          high nibble q of column 16 + 4j + i, q in 0..15;                            value d * (q - 8)
 *   INT4   the same DATA;                                                              value d * q + m
 */
enum expertd_format { EXPERTD_F32 = 0, EXPERTD_BF16 = 1, EXPERTD_INT8 = 2, EXPERTD_INT4 = 3, EXPERTD_INT4S = 4 };

/* Of g = gate and u = up: SILU, GELU (erf), GELU_TANH, RELU, RELU2 (relu squared): f(g) * u, or f(u) without a gate.
 * SWIGLU_CLAMPED: g' = min(g, limit), u' = u within +-limit: (u' + 1) * g' * sigmoid(alpha * g'). */
enum expertd_activation {
  EXPERTD_SILU = 0,
  EXPERTD_GELU = 1,
  EXPERTD_GELU_TANH = 2,
  EXPERTD_RELU = 3,
  EXPERTD_RELU2 = 4,
  EXPERTD_SWIGLU_CLAMPED = 5
};

/* In which order a record's matrices lie: as above, or as GPUs read them (kernels/row_order.py), which costs a turn of
 * each word on the way. */
enum expertd_order { EXPERTD_STRIPS = 0, EXPERTD_ROWS = 1 };

typedef struct expertd_pool expertd_pool;

typedef struct expertd_matrix {
  const void *data;
  const float *bias; /* [rows], or null */
  int32_t format;
  int32_t rows;
  int32_t cols;
} expertd_matrix;

/* One expert's record: gate_proj [inner, hidden], up_proj [inner, hidden], down_proj [hidden, inner] and float32
 * biases, each at an offset in bytes from the record's beginning; -1 = absent (gate, biases). */
typedef struct expertd_expert_layout {
  int32_t hidden;
  int32_t inner;
  int32_t format;
  int32_t activation;
  float alpha; /* SWIGLU_CLAMPED */
  float limit;
  int64_t gate, up, down;
  int64_t gate_bias, up_bias, down_bias;
  int32_t order; /* expertd_order; float formats lie alike in both */
} expertd_expert_layout;

/* Text of the calling thread's last error; valid until its next failing call. */
EXPERTD_API const char *expertd_error(void);
EXPERTD_API int32_t expertd_abi_version(void);

/* Instruction sets: "portable", "avx2", "avx512", "neon". expertd_isa: the one in use. expertd_isa_available: those
 * that this build has and this processor runs, best first, separated by spaces. expertd_isa_use: force one, or "" for
 * the best; for the whole process, between calls. The first call of any kernel chooses the best. */
EXPERTD_API const char *expertd_isa(void);
EXPERTD_API const char *expertd_isa_available(void);
EXPERTD_API int expertd_isa_use(const char *name);

/* A pool of `threads` compute threads, of which the caller of a kernel is one; one call at a time. Its threads are
 * parked between calls. Scratch memory grows to the largest call and is kept until the pool is destroyed. */
EXPERTD_API int expertd_pool_create(int32_t threads, expertd_pool **pool);
EXPERTD_API int expertd_pool_destroy(expertd_pool *pool);
EXPERTD_API int64_t expertd_pool_scratch_bytes(const expertd_pool *pool);

/* Bytes of a matrix in a format, or -1 (with a text) for a format or dimensions that are refused. */
EXPERTD_API int64_t expertd_matrix_bytes(int32_t format, int64_t rows, int64_t cols);

/* y[t, n] = sum_k W[n, k] x[t, k] + bias[n], for `rows` rows of x; row t begins at x + t * ldx and y + t * ldy.
 * Integer formats read x as int8 in groups of 32 (scale = largest magnitude / 127, round to nearest even). */
EXPERTD_API int expertd_matmul(expertd_pool *pool, const expertd_matrix *matrix, const float *x, int64_t rows,
                               int64_t ldx, float *y, int64_t ldy);

/* out[i, :] = row ids[i] of the matrix, as float32 [n, cols] (bias not added). */
EXPERTD_API int expertd_rows(const expertd_matrix *matrix, const int64_t *ids, int64_t n, float *out);

/* All routed experts of an MoE layer, or those of them that are at hand. x, out: [tokens, hidden]. Expert e of
 * `num_experts`, in ascending id, has its record at records[e] and serves pairs pair_begin[e] .. pair_begin[e + 1]:
 * pair p is row pair_row[p] with weight pair_weight[p]. A row appears at most once within one expert.
 * partials null: out[row] += weight * y, expert after expert. Else partials[p] = weight * y ([pairs, hidden]) and out
 * is not touched: adding them in ascending order gives the same bits. */
EXPERTD_API int expertd_moe(expertd_pool *pool, const expertd_expert_layout *layout, const float *x, int64_t tokens,
                            int32_t num_experts, const void *const *records, const int32_t *pair_begin,
                            const int32_t *pair_row, const float *pair_weight, float *out, float *partials);

/* The same arguments, for a call that does this and more (expertd_block.h). */
typedef struct expertd_moe_call {
  const expertd_expert_layout *layout;
  const float *x;
  int64_t tokens;
  int32_t num_experts;
  const void *const *records;
  const int32_t *pair_begin;
  const int32_t *pair_row;
  const float *pair_weight;
  float *out;
  float *partials;
} expertd_moe_call;

#ifdef __cplusplus
}
#endif
#endif
