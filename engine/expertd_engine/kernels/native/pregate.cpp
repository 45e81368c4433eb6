// A pre-gating router in one call, made of the phases of a decoder layer. Its activations live in the pool's scratch.
#include "expertd_pregate.h"

#include <numeric>
#include <string>

#include "block.h"
#include "block_kernels.h"
#include "errors.h"
#include "linear.h"

namespace expertd {
namespace {

void check_pregate(const expertd_pregate& p) {
  check_matrix("embedding", &p.embedding);
  check_matrix("entry", &p.entry);
  check_matrix("head", &p.head);
  check_block(&p.block);
  require(p.block.router.scores == EXPERTD_SCORES_DENSE, "the router's own block has routed experts; it must be dense");
  const bool fits = p.entry.cols == p.embedding.cols && p.entry_norm.kind && p.entry_norm.length == p.entry.cols &&
                    p.entry.rows == p.block.hidden && p.head_norm.kind && p.head_norm.length == p.block.hidden &&
                    p.head.cols == p.block.hidden;
  require(fits, "embedding, entry, block and head do not follow on each other");
  const expertd_router& r = p.router;
  require(p.heads >= 1 && r.experts >= 1 && p.head.rows == int64_t(p.heads) * r.experts,
          std::to_string(p.heads) + " choices of " + std::to_string(r.experts) + " experts do not fit " +
              std::to_string(p.head.rows) + " logits");
  require(r.top_k >= 1 && r.top_k <= r.experts && r.scores > EXPERTD_SCORES_LOGITS && r.scores < EXPERTD_SCORES_GIVEN,
          "top_k is " + std::to_string(r.top_k) + " and scores " + std::to_string(r.scores) +
              "; allowed are 1 to " + std::to_string(r.experts) + " and 2 to 4");
}

// Everything up to the logits. Returns the step with memory of its own.
expertd_step run(Pool& pool, const expertd_pregate& p, const float* embeddings, const expertd_step& step) {
  const int64_t width = p.block.hidden;
  int64_t* const all = pool.scratch().get<int64_t>(step.rows);
  std::iota(all, all + step.rows, 0);
  expertd_step own = step;
  own.hidden = pool.scratch().get<float>(step.rows * width);
  own.normed = pool.scratch().get<float>(step.rows * width);
  own.added = pool.scratch().get<float>(step.rows * width);
  if (!own.logits) own.logits = pool.scratch().get<float>(step.rows * p.head.rows);
  head_logits(pool, p.entry_norm, p.entry, 1.0f, embeddings, all, step.rows, own.hidden);
  layer_forward(pool, p.block, nullptr, nullptr, own);
  layer_finish(pool, p.block, nullptr, own);
  head_logits(pool, p.head_norm, p.head, 1.0f, own.hidden, all, step.rows, own.logits);
  return own;
}

void choose(Pool& pool, const expertd_pregate& p, const expertd_step& own, int64_t* experts, float* weights) {
  const expertd_router& router = p.router;
  float* const work = pool.scratch().get<float>(select_scratch(router));
  for (int64_t i = 0; i < own.rows * p.heads; ++i)
    block_kernels().select(router, own.logits + i * router.experts, nullptr, work, experts + i * router.top_k,
                           weights + i * router.top_k);
}

}  // namespace
}  // namespace expertd

using namespace expertd;

extern "C" int64_t expertd_pregate_bytes(void) { return sizeof(expertd_pregate); }

extern "C" int expertd_pregate_forward(expertd_pool* pool, const expertd_pregate* pregate, const int64_t* tokens,
                                       const expertd_step* step, int64_t* experts, float* weights) {
  return guarded([&] {
    require(pregate != nullptr && tokens != nullptr && experts != nullptr && weights != nullptr,
            "pregate, tokens, experts or weights is null");
    check_pregate(*pregate);
    check_step(step, pregate->block);
    Call call(pool);
    float* const embeddings = call.pool().scratch().get<float>(step->rows * pregate->embedding.cols);
    const int code = expertd_rows(&pregate->embedding, tokens, step->rows, embeddings);
    require(code == EXPERTD_OK, expertd_error());
    choose(call.pool(), *pregate, run(call.pool(), *pregate, embeddings, *step), experts, weights);
  });
}
