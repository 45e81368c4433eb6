// The C interface of a layer's routed experts: refuses what makes no sense, by name, before anything is computed.
#include <string>

#include "errors.h"
#include "formats.h"
#include "moe.h"
#include "row_order.h"

namespace expertd {
namespace {

void check_cuts(const expertd_moe_call& a, const int32_t* cuts) {
  if (cuts == nullptr) return;
  const int32_t inner = a.layout->inner;
  require(a.layout->order == EXPERTD_ROWS, "layout.order is 0 (strips), of which no part can be left out");
  for (int32_t e = 0; e < a.num_experts; ++e) {
    require(cuts[e] >= 0 && cuts[e] < inner && cuts[e] % kCutColumns == 0,
            "cuts[" + std::to_string(e) + "] is " + std::to_string(cuts[e]) + "; allowed are multiples of " +
                std::to_string(kCutColumns) + " below " + std::to_string(inner));
  }
}

void check_layout(const expertd_expert_layout* layout) {
  require(layout != nullptr, "layout is null");
  check_format(layout->format);
  check_dimension("layout.hidden", layout->hidden);
  check_dimension("layout.inner", layout->inner);
  require(layout->activation >= EXPERTD_SILU && layout->activation <= EXPERTD_SWIGLU_CLAMPED,
          "layout.activation is " + std::to_string(layout->activation) + "; allowed are 0 to 5");
  require(layout->up >= 0 && layout->down >= 0, "layout.up or layout.down is absent: every expert has both");
  require(layout->activation != EXPERTD_SWIGLU_CLAMPED || (layout->gate >= 0 && layout->limit >= 0),
          "the clamped swiglu needs a gate and a limit that is not negative");
  require(layout->order == EXPERTD_STRIPS || layout->order == EXPERTD_ROWS,
          "layout.order is " + std::to_string(layout->order) + "; allowed are 0 (strips) and 1 (rows)");
  for (const int64_t offset : {layout->gate, layout->up, layout->down, layout->gate_bias, layout->up_bias,
                               layout->down_bias}) {
    require(offset == -1 || (offset >= 0 && offset % 4 == 0),
            "layout has an offset of " + std::to_string(offset) + "; allowed are -1 and multiples of 4");
  }
}

void check_pairs(const expertd_moe_call& a) {
  require(a.num_experts >= 0 && a.tokens >= 0, "num_experts or tokens is negative");
  require(a.pair_begin != nullptr, "pair_begin is null");
  require(a.pair_begin[0] >= 0, "pair_begin[0] is negative");
  for (int32_t e = 0; e < a.num_experts; ++e) {
    const std::string expert = std::to_string(e);
    require(a.pair_begin[e + 1] >= a.pair_begin[e], "pair_begin falls after expert " + expert);
    if (a.pair_begin[e + 1] == a.pair_begin[e]) continue;
    require(a.records != nullptr && a.records[e] != nullptr, "records[" + expert + "] is null, and it has pairs");
  }
  if (a.pair_begin[a.num_experts] == a.pair_begin[0]) return;
  require(a.pair_row != nullptr && a.pair_weight != nullptr, "pair_row or pair_weight is null");
  for (int32_t p = a.pair_begin[0]; p < a.pair_begin[a.num_experts]; ++p) {
    require(a.pair_row[p] >= 0 && a.pair_row[p] < a.tokens,
            "pair_row[" + std::to_string(p) + "] is " + std::to_string(a.pair_row[p]) + "; there are " +
                std::to_string(a.tokens) + " tokens");
  }
}

}  // namespace

void check_moe(const expertd_moe_call& experts, const int32_t* cuts) {
  check_layout(experts.layout);
  check_pairs(experts);
  check_cuts(experts, cuts);
  const bool has_result = experts.out != nullptr || experts.partials != nullptr;
  require(experts.tokens == 0 || (experts.x != nullptr && has_result), "x is null, or both out and partials");
}

}  // namespace expertd

using namespace expertd;

extern "C" int expertd_moe(expertd_pool* pool, const expertd_expert_layout* layout, const float* x, int64_t tokens,
                           int32_t num_experts, const void* const* records, const int32_t* pair_begin,
                           const int32_t* pair_row, const float* pair_weight, float* out, float* partials) {
  return guarded([&] {
    const expertd_moe_call experts{layout,   x,           tokens, num_experts, records, pair_begin,
                                   pair_row, pair_weight, out,    partials};
    check_moe(experts);
    Call call(pool);
    run_moe(call.pool(), experts);
  });
}
