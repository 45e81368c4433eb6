// Many layers in one call, for as long as every expert that a layer chooses is at hand.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "block.h"
#include "errors.h"
#include "moe.h"
#include "substitute.h"

namespace expertd {
namespace {

struct Choice {
  int64_t expert;
  int32_t row;
  float weight;
};

// What each row of a layer goes to: `width` experts and weights a row, of which `counts` (null: all) are meant.
struct Routes {
  const int64_t* experts;
  const float* weights;
  int32_t width;
  const int32_t* counts;
};

// The experts of one layer as a call, with the memory that it points to.
class Chosen {
 public:
  // False if one of them is absent.
  bool choose(const expertd_run& run, int32_t layer, const expertd_step& step, const Routes& routes) {
    choices_.clear();
    for (int64_t row = 0; row < step.rows; ++row)
      for (int64_t i = row * routes.width, end = i + (routes.counts ? routes.counts[row] : routes.width); i < end; ++i)
        choices_.push_back({routes.experts[i], static_cast<int32_t>(row), routes.weights[i]});
    std::sort(choices_.begin(), choices_.end(), [](const Choice& a, const Choice& b) {
      return a.expert != b.expert ? a.expert < b.expert : a.row < b.row;
    });
    return prepare(run, layer, step);
  }
  const expertd_moe_call& call() const { return call_; }
  int64_t pairs() const { return static_cast<int64_t>(rows_.size()); }

 private:
  bool prepare(const expertd_run& run, int32_t layer, const expertd_step& step) {
    records_.clear(), begin_.clear(), rows_.clear(), weights_.clear();
    for (const Choice& choice : choices_) {
      if (rows_.empty() || choice.expert != last_) {
        const int64_t slot = run.slots[layer][choice.expert];
        if (slot < 0) return false;
        records_.push_back(run.slot_zero + slot * run.slot_stride);
        begin_.push_back(static_cast<int32_t>(rows_.size()));
        last_ = choice.expert;
      }
      rows_.push_back(choice.row);
      weights_.push_back(choice.weight);
    }
    begin_.push_back(static_cast<int32_t>(rows_.size()));
    call_ = {run.layouts[layer], step.normed,  step.rows,       static_cast<int32_t>(records_.size()),
             records_.data(),    begin_.data(), rows_.data(), weights_.data(), run.routed, nullptr};
    return true;
  }

  int64_t last_ = -1;
  std::vector<Choice> choices_;
  std::vector<const void*> records_;
  std::vector<int32_t> begin_, rows_;
  std::vector<float> weights_;
  expertd_moe_call call_{};
};

void check_given(const expertd_run& run, int32_t layer, const expertd_step& step) {
  const expertd_router& router = run.blocks[layer]->router;
  const int64_t* given = run.given + layer * run.chosen_stride;
  for (int64_t i = 0; i < step.rows * router.top_k; ++i)
    require(given[i] >= 0 && given[i] < router.experts, "layer " + std::to_string(layer) + " is given expert " +
                                                            std::to_string(given[i]) + "; there are " +
                                                            std::to_string(router.experts));
}

void check_run(const expertd_run* run, int32_t first, const expertd_step* step, const int32_t* reached) {
  require(run != nullptr && run->blocks && run->layouts && run->slots && run->routed && run->chosen,
          "run, or something it needs, is null");
  require(first >= 0 && first < run->layers,
          "the first layer is " + std::to_string(first) + "; there are " + std::to_string(run->layers));
  require(reached != nullptr, "reached is null");
  for (int32_t layer = first; layer < run->layers; ++layer) {
    check_block(run->blocks[layer]);
    check_step(step, *run->blocks[layer]);
    const bool routes = run->blocks[layer]->router.scores != EXPERTD_SCORES_DENSE;
    require(routes == (run->layouts[layer] != nullptr) && routes == (run->slots[layer] != nullptr),
            "layer " + std::to_string(layer) + " has a router and no experts, or experts and no router");
    if (routes && run->given) check_given(*run, layer, *step);
  }
}

void check_held(const expertd_run& run, const expertd_held_run* held, int32_t first, const expertd_step& step) {
  require(held != nullptr && held->layers && held->tallies && held->weights && held->lengths && held->served &&
              held->row_replaced && held->row_mass,
          "held, or something it needs, is null");
  for (int32_t layer = first; layer < run.layers; ++layer) {
    if (!run.layouts[layer]) continue;
    check_substitution(run.blocks[layer]->router, held->layers[layer], step.rows);
    const expertd_tally& tally = held->tallies[layer];
    require(tally.choices && tally.replaced && tally.mass && (tally.norms || !tally.scores),
            "the tally of layer " + std::to_string(layer) + " lacks something");
  }
}

// The length of a row, in sixteen partial sums whatever the processor.
float length_of(const float* x, int64_t count) {
  float sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int j = 0; j < 16; ++j) sums[j] += x[i + j] * x[i + j];
  for (int j = 0; i < count; ++i, ++j) sums[j] += x[i] * x[i];
  float total = 0.0f;
  for (const float sum : sums) total += sum;
  return std::sqrt(total);
}

class Run {
 public:
  // `held` null: rows go where their router sends them.
  Run(Pool& pool, const expertd_run& run, const expertd_held_run* held, const expertd_step& step)
      : pool_(pool), run_(run), held_(held), step_(step) {}

  // Returns the layer that cannot go on, or the number of layers.
  int32_t forward(int32_t first, const expertd_moe_call* experts) {
    for (int32_t layer = first; layer < run_.layers; ++layer) {
      if (experts) run_moe(pool_, *experts);
      experts = nullptr;
      const expertd_block* previous = layer > 0 ? run_.blocks[layer - 1] : nullptr;
      const bool was_routed = layer > 0 && run_.layouts[layer - 1];
      layer_forward(pool_, *run_.blocks[layer], previous, was_routed ? run_.routed : nullptr, step_);
      pool_.scratch().reset();
      if (!run_.layouts[layer]) continue;
      if (!route(layer)) return layer;
      experts = &chosen_.call();
    }
    if (experts) run_moe(pool_, *experts);
    const int32_t last = run_.layers - 1;
    layer_finish(pool_, *run_.blocks[last], run_.layouts[last] ? run_.routed : nullptr, step_);
    return run_.layers;
  }

 private:
  // Whether the layer's experts are at hand.
  bool route(int32_t layer) {
    const expertd_router& router = run_.blocks[layer]->router;
    const int64_t count = step_.rows * router.top_k;
    if (run_.given) std::copy_n(run_.given + layer * run_.chosen_stride, count, step_.experts);
    Routes routes{step_.experts, step_.weights, router.top_k, nullptr};
    if (held_) {
      expertd_substitution s = held_->layers[layer];
      s.held = held_now(s.held, router.experts);
      if (!substitute(pool_, router, s, step_.rows, step_.logits, step_.experts, step_.weights)) return false;
      routes = {s.experts, s.weights, 2 * router.top_k, s.counts};
    }
    if (!chosen_.choose(run_, layer, step_, routes)) return false;
    std::copy_n(step_.experts, count, run_.chosen + layer * run_.chosen_stride);
    if (held_) observe(layer, count);
    return true;
  }

  // Experts may arrive while the call runs: a layer's rows all see the same ones, and whatever was written before.
  const uint8_t* held_now(const uint8_t* held, int64_t experts) {
    now_.resize(experts);
    for (int64_t e = 0; e < experts; ++e) now_[e] = __atomic_load_n(held + e, __ATOMIC_ACQUIRE);
    return now_.data();
  }

  // What the router wanted, whoever serves it.
  void observe(int32_t layer, int64_t count) {
    float* const lengths = held_->lengths + layer * held_->lengths_stride;
    const int64_t width = run_.blocks[layer]->hidden;
    std::copy_n(step_.weights, count, held_->weights + layer * run_.chosen_stride);
    for (int64_t row = 0; row < step_.rows; ++row) lengths[row] = length_of(step_.normed + row * width, width);
    if (held_->tallies[layer].scores) add_scores(layer, lengths);
    count_layer(layer, count);
  }

  // A row's products and their sum over rows are rounded as where Python does this.
  void add_scores(int32_t layer, const float* lengths) {
    const expertd_tally& tally = held_->tallies[layer];
    const expertd_router& router = run_.blocks[layer]->router;
    sums_.assign(router.experts, 0.0);
    for (int64_t row = 0, i = 0; row < step_.rows; ++row)
      for (int32_t k = 0; k < router.top_k; ++k, ++i)
        sums_[step_.experts[i]] += double(lengths[row] * step_.weights[i] * tally.norms[step_.experts[i]]);
    for (int32_t e = 0; e < router.experts; ++e) tally.scores[e] += sums_[e] * held_->unit;
  }

  void count_layer(int32_t layer, int64_t count) {
    const expertd_tally& tally = held_->tallies[layer];
    const expertd_substitution& s = held_->layers[layer];
    *tally.choices += count;
    for (int64_t row = 0; row < step_.rows; ++row) {
      *tally.replaced += s.replaced[row], held_->row_replaced[row] += s.replaced[row];
      *tally.mass += s.mass[row], held_->row_mass[row] += s.mass[row];
    }
    held_->served[2 * layer] = chosen_.call().num_experts;
    held_->served[2 * layer + 1] = chosen_.pairs();
  }

  Pool& pool_;
  const expertd_run& run_;
  const expertd_held_run* held_;
  const expertd_step& step_;
  Chosen chosen_;
  std::vector<uint8_t> now_;
  std::vector<double> sums_;
};

}  // namespace
}  // namespace expertd

using namespace expertd;

extern "C" int expertd_run_forward(expertd_pool* pool, const expertd_run* run, int32_t first,
                                   const expertd_moe_call* experts, const expertd_step* step, int32_t* reached) {
  return guarded([&] {
    check_run(run, first, step, reached);
    if (experts) check_moe(*experts);
    Call call(pool);
    *reached = Run(call.pool(), *run, nullptr, *step).forward(first, experts);
  });
}

extern "C" int expertd_run_held(expertd_pool* pool, const expertd_run* run, const expertd_held_run* held, int32_t first,
                                const expertd_moe_call* experts, const expertd_step* step, int32_t* reached) {
  return guarded([&] {
    check_run(run, first, step, reached);
    check_held(*run, held, first, *step);
    require(run->given == nullptr, "experts are given to a run among held ones");
    if (experts) check_moe(*experts);
    Call call(pool);
    *reached = Run(call.pool(), *run, held, *step).forward(first, experts);
  });
}
