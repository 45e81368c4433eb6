// What tokens will probably ask for: a product, and a softmax in each layer. Who comes for whom because of that.
#include "expertd_foresee.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "errors.h"
#include "pool.h"

namespace expertd {
namespace {

// Adds `share` of a token to the experts that one layer's logits name.
void add_named(const float* logits, int32_t experts, int32_t named, float share, std::vector<float>& work,
               float* expected) {
  work.assign(logits, logits + experts);
  std::nth_element(work.begin(), work.begin() + named - 1, work.end(), std::greater<float>());
  const float least = work[named - 1];
  const float largest = *std::max_element(work.begin(), work.begin() + named);
  float total = 0.0f;
  for (int32_t e = 0; e < experts; ++e) {
    work[e] = logits[e] >= least ? std::exp(logits[e] - largest) : 0.0f;
    total += work[e];
  }
  for (int32_t e = 0; e < experts; ++e) expected[e] += share * work[e] / total;
}

std::vector<int64_t> best_lacking(const expertd_held_sets& sets, const float* expected) {
  std::vector<int64_t> lacking;
  for (int64_t at = 0, count = int64_t(sets.layers) * sets.experts; at < count; ++at)
    if (!sets.taken[at] && expected[at] > 0.0f) lacking.push_back(at);
  const size_t found = std::min<size_t>(sets.candidates, lacking.size());
  std::partial_sort(lacking.begin(), lacking.begin() + found, lacking.end(), [expected](int64_t a, int64_t b) {
    return expected[a] != expected[b] ? expected[a] > expected[b] : a < b;
  });
  lacking.resize(found);
  return lacking;
}

// One layer's experts, from its first on in every array.
class LayerSet {
 public:
  LayerSet(const expertd_held_sets& sets, const float* expected, int64_t first)
      : expected_(expected + first), scores_(sets.scores + first), held_(sets.held + first, sets.held + first + sets.experts) {
    double total = 0.0;
    for (int32_t e = 0; e < sets.experts; ++e) total += scores_[e];
    total_ = std::max(total, 1e-300);
    left_ = static_cast<int32_t>(held_.size() - std::count(held_.begin(), held_.end(), uint8_t{0}));
  }

  int32_t left() const { return left_; }

  // Who leaves for the newcomer, for good; -1: nobody.
  int64_t give_way_to(int64_t newcomer, double factor) {
    int64_t least = -1;
    for (size_t e = 0; e < held_.size(); ++e)
      if (held_[e] && (least < 0 || worth(e) < worth(least))) least = static_cast<int64_t>(e);
    if (least < 0 || worth(newcomer) <= worth(least) * factor) return -1;
    held_[least] = 0;
    --left_;
    return least;
  }

 private:
  double worth(int64_t expert) const { return double(expected_[expert]) + scores_[expert] / total_; }

  const float* expected_;
  const double* scores_;
  std::vector<uint8_t> held_;
  double total_ = 0.0;
  int32_t left_ = 0;
};

int32_t choose_swaps(const expertd_held_sets& sets, const float* expected, int32_t most, int64_t* newcomers,
                     int64_t* victims) {
  std::map<int64_t, LayerSet> layers;  // those that candidates are of, by their first expert
  int32_t found = 0;
  for (const int64_t newcomer : best_lacking(sets, expected)) {
    if (found == most) break;
    const int64_t first = newcomer - newcomer % sets.experts;
    LayerSet& layer = layers.try_emplace(first, sets, expected, first).first->second;
    if (layer.left() <= sets.least) continue;
    const int64_t victim = layer.give_way_to(newcomer - first, sets.factor);
    if (victim < 0) continue;
    newcomers[found] = newcomer;
    victims[found++] = first + victim;
  }
  return found;
}

}  // namespace
}  // namespace expertd

using namespace expertd;

extern "C" int expertd_foresee(const expertd_matrix* map, const float* x, int64_t tokens, int32_t layers,
                               int32_t experts, int32_t named, float* logits, float* expected) {
  return guarded([&] {
    require(map && x && logits && expected, "something that foreseeing needs is null");
    const int64_t width = int64_t(layers) * experts;
    require(layers >= 1 && experts >= 1 && map->rows == width,
            std::to_string(layers) + " layers of " + std::to_string(experts) + " experts do not fit " +
                std::to_string(map->rows) + " logits");
    require(named >= 1 && named <= experts && tokens >= 1,
            "named is " + std::to_string(named) + " and tokens " + std::to_string(tokens) + "; allowed are 1 to " +
                std::to_string(experts) + ", and 1 and more");
    static thread_local expertd_pool alone{Pool(1)};
    const int code = expertd_matmul(&alone, map, x, tokens, map->cols, logits, width);
    require(code == EXPERTD_OK, expertd_error());
    std::fill_n(expected, width, 0.0f);
    std::vector<float> work;
    for (int64_t row = 0; row < tokens * layers; ++row)
      add_named(logits + row * experts, experts, named, 1.0f / tokens, work, expected + row % layers * experts);
  });
}

extern "C" int expertd_choose_swaps(const expertd_held_sets* sets, const float* expected, int32_t most,
                                    int64_t* newcomers, int64_t* victims, int32_t* found) {
  return guarded([&] {
    require(sets && sets->held && sets->taken && sets->scores && expected && newcomers && victims && found,
            "something that swaps are chosen by is null");
    require(sets->layers >= 1 && sets->experts >= 1 && sets->candidates >= 0 && most >= 0,
            "layers, experts, candidates and most are " + std::to_string(sets->layers) + ", " +
                std::to_string(sets->experts) + ", " + std::to_string(sets->candidates) + " and " +
                std::to_string(most) + "; allowed are 1 and more, 1 and more, 0 and more, 0 and more");
    *found = choose_swaps(*sets, expected, most, newcomers, victims);
  });
}
