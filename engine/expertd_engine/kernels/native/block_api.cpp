// The C interface of a decoder layer: refuses what does not fit together, by name, before anything is computed.
#include <algorithm>
#include <string>

#include "block.h"
#include "errors.h"
#include "formats.h"
#include "moe.h"

namespace expertd {
namespace {

// Checked at every call, so the text is made only where it is needed.
template <class Text>
void demand(bool condition, Text text) {
  if (!condition) throw Refused(text());
}

std::string number(int64_t value) { return std::to_string(value); }

void check_shape(const char* name, const expertd_matrix& matrix, int64_t rows, int64_t cols) {
  demand(matrix.data != nullptr, [&] { return std::string(name) + ".data is null"; });
  demand(matrix.format >= EXPERTD_F32 && matrix.format <= EXPERTD_INT4S,
         [&] { return std::string(name) + ".format is " + number(matrix.format) + "; allowed are 0 to 4"; });
  demand(rows > 0 && cols > 0 && matrix.rows == rows && matrix.cols == cols, [&] {
    return std::string(name) + " is " + number(matrix.rows) + " x " + number(matrix.cols) + "; it must be " +
           number(rows) + " x " + number(cols);
  });
}

void check_norm(const char* name, const expertd_norm& norm, int64_t length) {
  if (norm.kind == EXPERTD_NORM_NONE) return;
  demand(norm.weight != nullptr && norm.length >= 1 && length % norm.length == 0, [&] {
    return std::string(name) + " is of " + number(norm.length) + " numbers; it must fit " + number(length);
  });
}

void check_router(const expertd_router& r, int64_t hidden) {
  if (r.scores == EXPERTD_SCORES_DENSE) return;
  if (r.scores != EXPERTD_SCORES_GIVEN) check_shape("router", r.matrix, r.experts, hidden);
  demand(r.top_k >= 1 && r.top_k <= r.experts, [&] {
    return "top_k is " + number(r.top_k) + "; allowed are 1 to " + number(r.experts) + ", the number of experts";
  });
  if (r.groups <= 1) return;
  const int32_t size = r.experts / r.groups;
  const bool fits = r.experts % r.groups == 0 && r.groups_kept >= 1 && r.groups_kept <= r.groups &&
                    r.group_best >= 1 && r.group_best <= std::min(8, size) && r.top_k <= r.groups_kept * size;
  demand(fits, [&] {
    return number(r.groups) + " groups, " + number(r.groups_kept) + " of them kept, do not fit " + number(r.experts) +
           " experts";
  });
}

void check_ffn(const expertd_block& b) {
  check_router(b.router, b.hidden);
  if (b.ffn.up.data == nullptr) return;
  check_shape("ffn.up", b.ffn.up, b.ffn.up.rows, b.hidden);
  if (b.ffn.gate.data) check_shape("ffn.gate", b.ffn.gate, b.ffn.up.rows, b.hidden);
  check_shape("ffn.down", b.ffn.down, b.hidden, b.ffn.up.rows);
  if (b.ffn_gate.data) check_shape("ffn_gate", b.ffn_gate, 1, b.hidden);
}

}  // namespace

void check_block(const expertd_block* block) {
  require(block != nullptr, "block is null");
  const expertd_block& b = *block;
  demand(b.heads >= 1 && b.kv_heads >= 1 && b.heads % b.kv_heads == 0,
         [&] { return number(b.heads) + " query heads cannot share " + number(b.kv_heads) + " key heads"; });
  check_shape("query", b.query, int64_t(b.heads) * b.key_dim, b.hidden);
  check_shape("key", b.key, int64_t(b.kv_heads) * b.key_dim, b.hidden);
  check_shape("value", b.value, int64_t(b.kv_heads) * b.value_dim, b.hidden);
  check_shape("output", b.output, b.hidden, int64_t(b.heads) * b.value_dim);
  if (b.attention_gate.data) check_shape("attention_gate", b.attention_gate, b.output.cols, b.hidden);
  for (const expertd_norm* norm : {&b.input_norm, &b.attention_norm, &b.ffn_norm, &b.output_norm})
    demand(!norm->kind || (norm->weight && norm->length == b.hidden), [&] {
      return "a norm is of " + number(norm->length) + " numbers; it must be of " + number(b.hidden);
    });
  check_norm("query_norm", b.query_norm, b.query.rows);
  check_norm("key_norm", b.key_norm, b.key.rows);
  demand(!b.rope || (b.rotary_dim >= 2 && b.rotary_dim % 2 == 0 && b.rotary_dim <= b.key_dim && b.cos && b.sin), [&] {
    return "rotary_dim is " + number(b.rotary_dim) + "; allowed are even numbers up to the key dimension";
  });
  check_ffn(b);
}

void check_step(const expertd_step* step, const expertd_block& block) {
  require(step != nullptr, "step is null");
  demand(step->block_tokens >= 16 && step->block_tokens % 16 == 0,
         [&] { return "block_tokens is " + number(step->block_tokens) + "; allowed are multiples of 16"; });
  demand(is_float_format(step->kv_format),
         [&] { return "kv_format is " + number(step->kv_format) + "; allowed are 0 and 1"; });
  demand(step->rows >= 1 && step->span_row[step->spans] == step->rows,
         [&] { return "the spans are not the step's rows"; });
  for (int64_t row = 0; row < step->rows; ++row)
    demand(step->positions[row] >= 0 && (!block.rope || step->positions[row] < block.positions), [&] {
      return "position " + number(step->positions[row]) + " is not in the table of " + number(block.positions);
    });
}

namespace {

void check_experts(const expertd_moe_call* experts, const float* routed) {
  if (experts == nullptr) return;
  demand(routed != nullptr && experts->out == routed, [] { return std::string("the experts' result is not `routed`"); });
  check_moe(*experts);
}

}  // namespace
}  // namespace expertd

using namespace expertd;

extern "C" int64_t expertd_block_bytes(void) { return sizeof(expertd_block); }

extern "C" int64_t expertd_step_bytes(void) { return sizeof(expertd_step); }

extern "C" int expertd_block_forward(expertd_pool* pool, const expertd_block* block, const expertd_block* previous,
                                     const expertd_moe_call* experts, float* routed, const expertd_step* step) {
  return guarded([&] {
    check_block(block);
    check_step(step, *block);
    check_experts(experts, routed);
    Call call(pool);
    if (experts) run_moe(call.pool(), *experts);
    layer_forward(call.pool(), *block, previous, routed, *step);
  });
}

extern "C" int expertd_block_finish(expertd_pool* pool, const expertd_block* block, const expertd_moe_call* experts,
                                    float* routed, const expertd_step* step) {
  return guarded([&] {
    check_block(block);
    check_step(step, *block);
    check_experts(experts, routed);
    Call call(pool);
    if (experts) run_moe(call.pool(), *experts);
    layer_finish(call.pool(), *block, routed, *step);
  });
}

extern "C" int expertd_block_logits(expertd_pool* pool, const expertd_norm* norm, const expertd_matrix* head,
                                    float scale, const float* hidden, int64_t rows, const int64_t* logit_rows,
                                    int64_t count, float* logits) {
  return guarded([&] {
    require(norm != nullptr && norm->kind != EXPERTD_NORM_NONE, "norm is absent");
    require(head != nullptr, "head is null");
    check_shape("head", *head, head->rows, norm->length);
    for (int64_t i = 0; i < count; ++i)
      demand(logit_rows[i] >= 0 && logit_rows[i] < rows,
             [&] { return "logit row " + number(logit_rows[i]) + " is not one of " + number(rows); });
    Call call(pool);
    head_logits(call.pool(), *norm, *head, scale, hidden, logit_rows, count, logits);
  });
}
