// Many layers in one call, for as long as every expert that a layer chooses is at hand.
#include <algorithm>
#include <string>
#include <vector>

#include "block.h"
#include "errors.h"
#include "moe.h"

namespace expertd {
namespace {

struct Choice {
  int64_t expert;
  int32_t row;
  float weight;
};

// The experts of one layer as a call, with the memory that it points to.
class Chosen {
 public:
  // False if one of them is absent.
  bool choose(const expertd_run& run, int32_t layer, const expertd_step& step) {
    const int32_t top_k = run.blocks[layer]->router.top_k;
    choices_.clear();
    for (int64_t i = 0; i < step.rows * top_k; ++i)
      choices_.push_back({step.experts[i], static_cast<int32_t>(i / top_k), step.weights[i]});
    std::sort(choices_.begin(), choices_.end(), [](const Choice& a, const Choice& b) {
      return a.expert != b.expert ? a.expert < b.expert : a.row < b.row;
    });
    return prepare(run, layer, step);
  }
  const expertd_moe_call& call() const { return call_; }

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
  }
}

// Returns the layer that cannot go on, or the number of layers.
int32_t run_layers(Pool& pool, const expertd_run& run, int32_t first, const expertd_moe_call* experts,
                   const expertd_step& step) {
  Chosen chosen;
  for (int32_t layer = first; layer < run.layers; ++layer) {
    if (experts) run_moe(pool, *experts);
    experts = nullptr;
    const expertd_block* previous = layer > 0 ? run.blocks[layer - 1] : nullptr;
    const bool was_routed = layer > 0 && run.layouts[layer - 1];
    layer_forward(pool, *run.blocks[layer], previous, was_routed ? run.routed : nullptr, step);
    pool.scratch().reset();
    if (!run.layouts[layer]) continue;
    if (!chosen.choose(run, layer, step)) return layer;
    const int64_t count = step.rows * run.blocks[layer]->router.top_k;
    std::copy_n(step.experts, count, run.chosen + layer * run.chosen_stride);
    experts = &chosen.call();
  }
  if (experts) run_moe(pool, *experts);
  const int32_t last = run.layers - 1;
  layer_finish(pool, *run.blocks[last], run.layouts[last] ? run.routed : nullptr, step);
  return run.layers;
}

}  // namespace
}  // namespace expertd

using namespace expertd;

extern "C" int expertd_run_forward(expertd_pool* pool, const expertd_run* run, int32_t first,
                                   const expertd_moe_call* experts, const expertd_step* step, int32_t* reached) {
  return guarded([&] {
    check_run(run, first, step, reached);
    if (experts) check_moe(*experts);
    Call call(pool);
    *reached = run_layers(call.pool(), *run, first, experts, *step);
  });
}
