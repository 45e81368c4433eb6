// Rows among held experts, compared with a plain account of the same rule: which choices stay, which are replaced within
// the row's limit, who answers for them and with what weight; and that nobody's weight is lost on the way.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "check.h"
#include "expertd_block.h"

using namespace check;

namespace {

constexpr int kExperts = 16, kTopK = 4, kRows = 6;
constexpr double kSharedFrom = 0.125;
int light = 0, heavy = 0;  // rows that lose something, by whether it is shared

struct Row {
  std::vector<float> logits;
  std::vector<int64_t> chosen;
  std::vector<float> weights;
  float limit;
};

struct Answer {
  std::vector<double> weights;  // by expert
  int replaced = 0;
  double mass = 0;
};

Row random_row(float limit) {
  Row row{random_floats(kExperts, 0.0f, 5.0f), std::vector<int64_t>(kExperts), {}, limit};
  std::iota(row.chosen.begin(), row.chosen.end(), 0);
  std::sort(row.chosen.begin(), row.chosen.end(),
            [&](int64_t a, int64_t b) { return row.logits[a] > row.logits[b]; });
  row.chosen.resize(kTopK);
  float total = 0.0f;
  for (const int64_t e : row.chosen) row.weights.push_back(std::exp(row.logits[e])), total += row.weights.back();
  for (float& weight : row.weights) weight /= total;
  return row;
}

Answer expected(const Row& row, const std::vector<uint8_t>& held, int shared_by) {
  Answer answer{std::vector<double>(kExperts)};
  std::vector<uint8_t> stays(kExperts);
  double lost = 0;
  bool goes_on = true;
  for (int k = kTopK - 1; k >= 0; --k) {  // the lightest first
    const int64_t e = row.chosen[k];
    const bool is_lost = !held[e] && goes_on && (row.limit >= 1 || lost + row.weights[k] <= row.limit + 1e-6);
    goes_on = goes_on && (held[e] || is_lost);
    if (is_lost) ++answer.replaced, lost += row.weights[k];
    else answer.weights[e] = row.weights[k], stays[e] = 1;
  }
  answer.mass = lost;
  std::vector<int> others;
  for (int e = 0; e < kExperts; ++e)
    if (held[e] && !stays[e]) others.push_back(e);
  std::sort(others.begin(), others.end(), [&](int a, int b) { return row.logits[a] > row.logits[b]; });
  int wanted = answer.replaced;
  if (lost >= kSharedFrom) wanted = std::max(wanted, std::min(wanted * shared_by, kTopK * 3 / 4));
  if (answer.replaced) ++(lost >= kSharedFrom ? heavy : light);
  others.resize(std::min<size_t>(others.size(), wanted));
  double sum = 0;
  for (const int e : others) sum += std::exp(double(row.logits[e]));
  for (const int e : others) answer.weights[e] += lost * std::exp(double(row.logits[e])) / sum;
  return answer;
}

void compare(const Row& row, const Answer& answer, const int64_t* experts, const float* weights, int count, int replaced,
             float mass) {
  expect(replaced == answer.replaced, "the wrong number of choices is replaced");
  expect(std::abs(mass - answer.mass) < 1e-5, "the substituted mass is wrong");
  expect(row.limit >= 1 || mass <= row.limit + 1e-5, "a row loses more than its limit");
  std::vector<double> got(kExperts);
  for (int i = 0; i < count; ++i) got[experts[i]] += weights[i];
  for (int e = 0; e < kExperts; ++e)
    expect(std::abs(got[e] - answer.weights[e]) < 1e-5, "an expert's weight is wrong");
}

void check_step(expertd_pool* pool, int held_count, int shared_by) {
  expertd_router router{};
  router.experts = kExperts, router.top_k = kTopK, router.scores = EXPERTD_SCORES_SOFTMAX, router.scale = 1.0f;
  router.groups = router.groups_kept = 1;
  std::vector<uint8_t> held(kExperts);
  std::fill_n(held.begin(), held_count, uint8_t{1});
  std::shuffle(held.begin(), held.end(), random_bits);
  std::vector<Row> rows;
  for (const float limit : {1.0f, 0.6f, 0.3f, 0.1f, 0.0f, 1.0f}) rows.push_back(random_row(limit));
  std::vector<float> logits, weights, limits, shares(kRows * 2 * kTopK), mass(kRows);
  std::vector<int64_t> chosen, experts(kRows * 2 * kTopK);
  std::vector<int32_t> counts(kRows), replaced(kRows);
  for (const Row& row : rows) {
    logits.insert(logits.end(), row.logits.begin(), row.logits.end());
    chosen.insert(chosen.end(), row.chosen.begin(), row.chosen.end());
    weights.insert(weights.end(), row.weights.begin(), row.weights.end());
    limits.push_back(row.limit);
  }
  const expertd_substitution s{held.data(),   limits.data(), shared_by,       experts.data(),
                               shares.data(), counts.data(), replaced.data(), mass.data()};
  succeeds(expertd_substitute(pool, &router, &s, kRows, logits.data(), chosen.data(), weights.data()));
  for (int r = 0; r < kRows; ++r)
    compare(rows[r], expected(rows[r], held, shared_by), &experts[r * 2 * kTopK], &shares[r * 2 * kTopK], counts[r],
            replaced[r], mass[r]);
  remember(shares);
}

}  // namespace

int main() {
  expertd_pool* pool = nullptr;
  succeeds(expertd_pool_create(2, &pool));
  for (int round = 0; round < 40; ++round)
    for (const int held : {kTopK, kTopK + 2, 9, 13})
      for (const int shared_by : {1, 2}) check_step(pool, held, shared_by);
  expect(std::min(light, heavy) > 100, "there are too few rows of one kind");
  succeeds(expertd_pool_destroy(pool));
  return report();
}
