// Rows routed among held experts: what stays, what is replaced, and by whom. One row never looks at another.
#include "substitute.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <string>

#include "block_kernels.h"
#include "errors.h"

namespace expertd {
namespace {

constexpr float kRounding = 1e-6f;   // of a sum of shares
constexpr float kSharedFrom = 0.125f;  // of a row's weight; model/substitution.py says why
constexpr int64_t kRowsPerTask = 4;

int64_t work_floats(const expertd_router& router) { return select_scratch(router) + router.experts + 2 * router.top_k; }
int64_t work_ids(const expertd_router& router) { return 2 * router.top_k; }
int64_t work_flags(const expertd_router& router) { return router.experts + router.top_k; }

class Row {
 public:
  Row(const expertd_router& router, const expertd_substitution& s, int64_t row, const float* logits,
      const int64_t* chosen, const float* weights)
      : router_(router), s_(s), row_(row), top_k_(router.top_k), logits_(logits), chosen_(chosen), weights_(weights) {}

  // Whether nothing is to be waited for. The work memory is as large as work_floats and so on say.
  bool route(float* floats, int64_t* ids, uint8_t* flags) {
    scratch_ = floats;
    lowered_ = scratch_ + select_scratch(router_);
    scores_ = lowered_ + router_.experts;
    others_ = ids;
    allowed_ = flags;
    replaced_ = flags + router_.experts;
    const int32_t lacking = mark_lacking();
    const int32_t replaced = lacking ? replace_lightest(lacking) : 0;
    keep_the_rest();
    if (replaced) share_among_others(replaced);
    s_.replaced[row_] = replaced;
    s_.mass[row_] = mass_;
    s_.counts[row_] = count_;
    for (int32_t i = count_; i < 2 * top_k_; ++i) put(i, experts()[0], 0.0f);
    return replaced == lacking;
  }

 private:
  int64_t* experts() { return s_.experts + row_ * 2 * top_k_; }
  void put(int32_t i, int64_t expert, float weight) {
    experts()[i] = expert;
    s_.weights[row_ * 2 * top_k_ + i] = weight;
  }

  int32_t mark_lacking() {
    int32_t lacking = 0;
    for (int32_t k = 0; k < top_k_; ++k) {
      total_ += weights_[k];
      lacking += !s_.held[chosen_[k]];
    }
    return lacking;
  }

  // Marks the choices that are replaced, and counts them.
  int32_t replace_lightest(int32_t lacking) {
    const float limit = s_.limits[row_], total = std::max(total_, FLT_MIN);
    std::fill_n(replaced_, top_k_, uint8_t{0});
    int32_t count = 0;
    for (; count < lacking; ++count) {
      int32_t lightest = -1;
      for (int32_t k = 0; k < top_k_; ++k)
        if (!replaced_[k] && !s_.held[chosen_[k]] && (lightest < 0 || weights_[k] < weights_[lightest])) lightest = k;
      const float share = weights_[lightest] / total;
      if (limit < 1.0f && mass_ + share > limit + kRounding) break;
      replaced_[lightest] = 1;
      mass_ += share;
      lost_ += weights_[lightest];
    }
    any_ = count > 0;
    return count;
  }

  void keep_the_rest() {
    for (int32_t k = 0; k < top_k_; ++k)
      if (!any_ || !replaced_[k]) put(count_++, chosen_[k], weights_[k]);
  }

  // As in model/substitution.py.
  int64_t num_substitutes(int64_t replaced) const {
    if (!(mass_ + kRounding >= kSharedFrom)) return replaced;
    return std::max(replaced, std::min(replaced * s_.shared_by, int64_t(top_k_) * 3 / 4));
  }

  // What stays is ranked last, so that it fills up where the held are few and hides nobody.
  void share_among_others(int32_t replaced) {
    const int32_t n = router_.experts, stay = count_;
    const float last = *std::min_element(logits_, logits_ + n) - 1.0f;
    std::copy_n(logits_, n, lowered_);
    std::copy_n(s_.held, n, allowed_);
    for (int32_t i = 0; i < stay; ++i) {
      lowered_[experts()[i]] = last;
      allowed_[experts()[i]] = 1;
    }
    const int64_t most = num_substitutes(replaced);
    const int64_t allowed = n - std::count(allowed_, allowed_ + n, uint8_t{0});
    expertd_router wide = router_;
    wide.top_k = static_cast<int32_t>(std::min(stay + most, allowed));
    block_kernels().select(wide, lowered_, allowed_, scratch_, others_, scores_);
    for (int32_t i = 0; i < wide.top_k; ++i)
      if (std::find(experts(), experts() + stay, others_[i]) != experts() + stay) scores_[i] = 0.0f;
    serve(most, wide.top_k);
  }

  // The `most` best of `count` others, as far as they score above 0, share what was lost; a row is never left without.
  void serve(int64_t most, int32_t count) {
    const int32_t stay = count_;
    float sum = 0.0f;
    for (; count_ - stay < most; ++count_) {
      const int32_t best = int32_t(std::max_element(scores_, scores_ + count) - scores_);
      if (!(scores_[best] > 0.0f) && count_ > 0) break;
      put(count_, others_[best], scores_[best]);
      sum += scores_[best];
      scores_[best] = 0.0f;
    }
    for (int32_t i = stay; i < count_; ++i) {
      float& weight = s_.weights[row_ * 2 * top_k_ + i];
      weight = sum > 0.0f ? weight * (lost_ / sum) : lost_ / float(count_ - stay);
    }
  }

  const expertd_router& router_;
  const expertd_substitution& s_;
  const int64_t row_;
  const int32_t top_k_;
  const float* logits_;
  const int64_t* chosen_;
  const float* weights_;
  float *scratch_ = nullptr, *lowered_ = nullptr, *scores_ = nullptr;
  int64_t* others_ = nullptr;
  uint8_t *allowed_ = nullptr, *replaced_ = nullptr;
  float total_ = 0.0f, lost_ = 0.0f, mass_ = 0.0f;
  int32_t count_ = 0;
  bool any_ = false;
};

}  // namespace

void check_substitution(const expertd_router& router, const expertd_substitution& s, int64_t rows) {
  require(s.held && s.limits && s.experts && s.weights && s.counts && s.replaced && s.mass,
          "substitution, or something it needs, is null");
  require(router.scores > EXPERTD_SCORES_LOGITS && router.scores != EXPERTD_SCORES_GIVEN,
          "the router does not select natively: scores is " + std::to_string(router.scores));
  require(s.shared_by >= 1, "shared_by is " + std::to_string(s.shared_by) + "; allowed are 1 and more");
  require(rows >= 1, "there are " + std::to_string(rows) + " rows");
  const int64_t held = router.experts - std::count(s.held, s.held + router.experts, uint8_t{0});
  require(held >= router.top_k,
          std::to_string(held) + " experts are held; a row needs " + std::to_string(router.top_k));
}

bool substitute(Pool& pool, const expertd_router& router, const expertd_substitution& s, int64_t rows,
                const float* logits, const int64_t* chosen, const float* weights) {
  const int64_t tasks = (rows + kRowsPerTask - 1) / kRowsPerTask, top_k = router.top_k;
  auto* const floats = pool.scratch().get<float>(tasks * work_floats(router));
  auto* const ids = pool.scratch().get<int64_t>(tasks * work_ids(router));
  auto* const flags = pool.scratch().get<uint8_t>(tasks * work_flags(router));
  std::atomic<bool> waits{false};
  pool.parallel_for(tasks, [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t row = task * kRowsPerTask; row < end; ++row) {
      Row one(router, s, row, logits + row * router.experts, chosen + row * top_k, weights + row * top_k);
      const bool served = one.route(floats + task * work_floats(router), ids + task * work_ids(router),
                                    flags + task * work_flags(router));
      if (!served) waits = true;
    }
  });
  return !waits;
}

}  // namespace expertd

using namespace expertd;

extern "C" int expertd_substitute(expertd_pool* pool, const expertd_router* router,
                                  const expertd_substitution* substitution, int64_t rows, const float* logits,
                                  const int64_t* chosen, const float* weights) {
  return guarded([&] {
    require(router && substitution && logits && chosen && weights, "an argument is null");
    check_substitution(*router, *substitution, rows);
    Call call(pool);
    substitute(call.pool(), *router, *substitution, rows, logits, chosen, weights);
  });
}
