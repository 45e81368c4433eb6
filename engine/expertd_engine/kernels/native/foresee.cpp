// What tokens will probably ask for: a product, a softmax in each layer, and the best of what is lacking.
#include "expertd_foresee.h"

#include <algorithm>
#include <cmath>
#include <functional>
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

int32_t best_lacking(const float* expected, const uint8_t* held, int64_t count, int32_t most, int64_t* wanted) {
  std::vector<int64_t> lacking;
  for (int64_t at = 0; at < count; ++at)
    if (!held[at] && expected[at] > 0.0f) lacking.push_back(at);
  const auto found = std::min<int64_t>(most, lacking.size());
  std::partial_sort(lacking.begin(), lacking.begin() + found, lacking.end(), [expected](int64_t a, int64_t b) {
    return expected[a] != expected[b] ? expected[a] > expected[b] : a < b;
  });
  std::copy_n(lacking.begin(), found, wanted);
  return static_cast<int32_t>(found);
}

}  // namespace
}  // namespace expertd

using namespace expertd;

extern "C" int expertd_foresee(const expertd_matrix* map, const float* x, int64_t tokens, int32_t layers,
                               int32_t experts, int32_t named, const uint8_t* held, int32_t most, float* logits,
                               float* expected, int64_t* wanted, int32_t* found) {
  return guarded([&] {
    require(map && x && held && logits && expected && wanted && found, "something that foreseeing needs is null");
    const int64_t width = int64_t(layers) * experts;
    require(layers >= 1 && experts >= 1 && map->rows == width,
            std::to_string(layers) + " layers of " + std::to_string(experts) + " experts do not fit " +
                std::to_string(map->rows) + " logits");
    require(named >= 1 && named <= experts && tokens >= 1 && most >= 0,
            "named is " + std::to_string(named) + ", tokens " + std::to_string(tokens) + " and most " +
                std::to_string(most) + "; allowed are 1 to " + std::to_string(experts) + ", 1 and more, 0 and more");
    expertd_pool alone{Pool(1)};
    const int code = expertd_matmul(&alone, map, x, tokens, map->cols, logits, width);
    require(code == EXPERTD_OK, expertd_error());
    std::fill_n(expected, width, 0.0f);
    std::vector<float> work;
    for (int64_t row = 0; row < tokens * layers; ++row)
      add_named(logits + row * experts, experts, named, 1.0f / tokens, work, expected + row % layers * experts);
    *found = best_lacking(expected, held, width, most, wanted);
  });
}
