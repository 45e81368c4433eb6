// A decoder layer against the same in double precision, and against itself: the same bits on every instruction set,
// with every number of threads, however a sequence is cut into steps and whoever is beside it. Stands alone, so that it
// can be built with sanitizers or for another processor. Prints the first difference and ends with 1; or what it checked
// and a hash of all results, and ends with 0.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "expertd_block.h"

namespace {

using check::expect, check::random_floats, check::succeeds;

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr int kBlockTokens = 16;
constexpr int kTokens = 150;  // past two key tiles
constexpr int kMates = 5;

struct Shape {
  std::string name;
  int hidden = 48, heads = 4, kv_heads = 2, key_dim = 16, value_dim = 16, inner = 40, experts = 12, top_k = 3;
  int rope = EXPERTD_ROPE_HALVES, rotary_dim = 16;
  int head_norm = 0;  // numbers that a norm of queries and keys covers: 0 none, 1 a head, 2 all heads
  bool norm_after_rope = false, parallel = false, sandwich = false, layer_norms = false, sinks = false;
  bool attention_gate = false, ffn_gate = false, bias = false, kv_bf16 = false;
  int ffn = 1;  // 0 none, 1 gated, 2 without a gate
  int window = 0;
  float clip = 0, residual = 1;
  int scores = EXPERTD_SCORES_SOFTMAX, groups = 0, groups_kept = 0, group_best = 0, shares = 0;
  float router_scale = 1;
};

// A layer with random weights, and what its descriptor points to.
struct Layer {
  explicit Layer(const Shape& shape);

  Shape shape;
  expertd_block block{};
  std::vector<std::unique_ptr<Floats>> memory;

  const float* keep(Floats values) {
    memory.push_back(std::make_unique<Floats>(std::move(values)));
    return memory.back()->data();
  }
  expertd_matrix matrix(int rows, int cols, bool bias = false) {
    const float* data = keep(random_floats(size_t(rows) * cols, 0, 1.7f / std::sqrt(float(cols))));
    return {data, bias ? keep(random_floats(rows, 0, 0.3f)) : nullptr, EXPERTD_F32, rows, cols};
  }
  expertd_norm norm(int length) {
    const bool layer = shape.layer_norms;
    return {keep(random_floats(length, 1, 0.3f)), layer ? keep(random_floats(length, 0, 0.3f)) : nullptr,
            layer ? EXPERTD_NORM_LAYER : EXPERTD_NORM_RMS, length, 1e-5f};
  }
};

Layer::Layer(const Shape& s) : shape(s) {
  expertd_block& b = block;
  b.input_norm = norm(s.hidden);
  if (!s.parallel) b.ffn_norm = norm(s.hidden);
  if (s.sandwich) b.attention_norm = norm(s.hidden), b.output_norm = norm(s.hidden);
  b.query = matrix(s.heads * s.key_dim, s.hidden, true);
  b.key = matrix(s.kv_heads * s.key_dim, s.hidden);
  b.value = matrix(s.kv_heads * s.value_dim, s.hidden, true);
  b.output = matrix(s.hidden, s.heads * s.value_dim);
  if (s.head_norm) {
    b.query_norm = norm(s.head_norm == 1 ? s.key_dim : s.heads * s.key_dim);
    b.key_norm = norm(s.head_norm == 1 ? s.key_dim : s.kv_heads * s.key_dim);
  }
  if (s.attention_gate) b.attention_gate = matrix(s.heads * s.value_dim, s.hidden);
  if (s.ffn_gate) b.ffn_gate = matrix(1, s.hidden);
  if (s.ffn == 1) b.ffn.gate = matrix(s.inner, s.hidden, true);
  if (s.ffn) b.ffn.up = matrix(s.inner, s.hidden), b.ffn.down = matrix(s.hidden, s.inner, true);
  b.router.scores = s.scores;
  if (s.scores != EXPERTD_SCORES_DENSE) b.router.matrix = matrix(s.experts, s.hidden, true);
  if (s.bias) b.router.bias = keep(random_floats(s.experts, 0, 0.1f));
  b.router.experts = s.experts, b.router.top_k = s.top_k, b.router.scale = s.router_scale, b.router.shares = s.shares;
  b.router.groups = s.groups, b.router.groups_kept = s.groups_kept, b.router.group_best = s.group_best;
  Floats cos, sin;
  for (int p = 0; p < 256; ++p)
    for (int i = 0; i < s.rotary_dim / 2; ++i) {
      const double angle = p * std::pow(100.0, -2.0 * i / std::max(1, s.rotary_dim));
      cos.push_back(float(std::cos(angle))), sin.push_back(float(std::sin(angle)));
    }
  b.cos = keep(cos), b.sin = keep(sin), b.positions = 256;
  if (s.sinks) b.sinks = keep(random_floats(s.heads));
  b.window = s.window, b.hidden = s.hidden, b.heads = s.heads, b.kv_heads = s.kv_heads;
  b.key_dim = s.key_dim, b.value_dim = s.value_dim, b.rope = s.rope, b.rotary_dim = s.rotary_dim;
  b.norm_after_rope = s.norm_after_rope, b.parallel = s.parallel, b.clip = s.clip;
  b.scale = 1.0f / std::sqrt(float(s.key_dim)), b.attention_residual = b.ffn_residual = s.residual;
}

// ---- the same in double precision ------------------------------------------------------------------------------------

Doubles times(const expertd_matrix& w, const Doubles& x) {
  Doubles y(w.rows);
  for (int r = 0; r < w.rows; ++r) {
    y[r] = w.bias ? w.bias[r] : 0;
    for (int c = 0; c < w.cols; ++c) y[r] += double(static_cast<const float*>(w.data)[size_t(r) * w.cols + c]) * x[c];
  }
  return y;
}

void normalise(const expertd_norm& norm, double* x, int length) {
  if (!norm.kind) return;
  for (int first = 0; first < length; first += norm.length) {
    double* run = x + first;
    double mean = 0, squares = 0;
    if (norm.kind == EXPERTD_NORM_LAYER) mean = std::accumulate(run, run + norm.length, 0.0) / norm.length;
    for (int i = 0; i < norm.length; ++i) squares += (run[i] - mean) * (run[i] - mean);
    const double scale = 1 / std::sqrt(squares / norm.length + norm.eps);
    for (int i = 0; i < norm.length; ++i)
      run[i] = (run[i] - mean) * scale * norm.weight[i] + (norm.bias ? norm.bias[i] : 0);
  }
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void place(const expertd_block& b, const expertd_norm& norm, Doubles& x, int position) {
  if (!b.norm_after_rope) normalise(norm, x.data(), int(x.size()));
  if (b.clip > 0)
    for (double& v : x) v = std::clamp<double>(v, -b.clip, b.clip);
  const int half = b.rotary_dim / 2;
  for (size_t head = 0; b.rope && head < x.size(); head += b.key_dim)
    for (int i = 0; i < half; ++i) {
      const bool pairs = b.rope == EXPERTD_ROPE_PAIRS;
      double &first = x[head + (pairs ? 2 * i : i)], &second = x[head + (pairs ? 2 * i + 1 : i + half)];
      const double a = first, c = b.cos[position * half + i], d = b.sin[position * half + i];
      first = a * c - second * d, second = second * c + a * d;
    }
  if (b.norm_after_rope) normalise(norm, x.data(), int(x.size()));
}

// Attention of the sequence's last token over all keys and values so far.
Doubles attend(const expertd_block& b, const Doubles& query, const std::vector<Doubles>& keys,
               const std::vector<Doubles>& values) {
  Doubles out(b.heads * b.value_dim);
  const int last = int(keys.size()) - 1, first = b.window ? std::max<int>(0, last + 1 - int(b.window)) : 0;
  for (int head = 0; head < b.heads; ++head) {
    const int shared = head / (b.heads / b.kv_heads);
    Doubles shares;
    double total = b.sinks ? std::exp(double(b.sinks[head])) : 0;
    for (int t = first; t <= last; ++t) {
      double score = 0;
      for (int d = 0; d < b.key_dim; ++d) score += query[head * b.key_dim + d] * keys[t][shared * b.key_dim + d];
      shares.push_back(std::exp(score * b.scale));
      total += shares.back();
    }
    for (int t = first; t <= last; ++t)
      for (int d = 0; d < b.value_dim; ++d)
        out[head * b.value_dim + d] += shares[t - first] / total * values[t][shared * b.value_dim + d];
  }
  return out;
}

std::vector<int> best(const Doubles& values, int count) {
  std::vector<int> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int c) { return values[a] > values[c]; });
  order.resize(count);
  return order;
}

struct Row {
  Doubles hidden, normed, weights;
  std::vector<int> experts;
};

void choose(const expertd_router& r, const Doubles& normed, Row& row) {
  const Doubles logits = times(r.matrix, normed);
  Doubles scores = logits;
  double total = 0;
  for (double& s : scores) total += s = r.scores == EXPERTD_SCORES_SIGMOID ? sigmoid(s) : std::exp(s);
  if (r.scores == EXPERTD_SCORES_SOFTMAX)
    for (double& s : scores) s /= total;
  Doubles eligible = scores, worth(std::max(1, r.groups));
  for (int e = 0; r.bias && e < r.experts; ++e) eligible[e] += r.bias[e];
  if (r.groups > 1) {
    const int size = r.experts / r.groups;
    for (int g = 0; g < r.groups; ++g) {
      const Doubles group(eligible.begin() + g * size, eligible.begin() + (g + 1) * size);
      for (int e : best(group, r.group_best)) worth[g] += group[e];
    }
    const std::vector<int> kept = best(worth, r.groups_kept);
    for (int e = 0; e < r.experts; ++e)
      if (std::find(kept.begin(), kept.end(), e / size) == kept.end()) eligible[e] = -1e300;
  }
  row.experts = best(eligible, r.top_k);
  double chosen = r.epsilon;
  for (int e : row.experts) chosen += scores[e];
  const bool divides = r.shares || r.scores == EXPERTD_SCORES_CHOSEN;
  for (int e : row.experts) row.weights.push_back(scores[e] / (divides ? chosen : 1) * r.scale);
}

double kept_as(bool bf16, double value) {
  float rounded = float(value);
  uint32_t bits;
  std::memcpy(&bits, &rounded, 4);
  if (bf16) bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&rounded, &bits, 4);
  return rounded;
}

// What stands in for the routed experts: a function of the row alone.
float stand_in(float normed) { return 0.25f * normed; }

std::vector<Row> reference(const Layer& layer, const Floats& input, int tokens) {
  const expertd_block& b = layer.block;
  std::vector<Doubles> keys, values;
  std::vector<Row> rows;
  for (int t = 0; t < tokens; ++t) {
    Doubles h(input.begin() + t * b.hidden, input.begin() + (t + 1) * b.hidden), x = h;
    normalise(b.input_norm, x.data(), b.hidden);
    Doubles query = times(b.query, x), key = times(b.key, x), value = times(b.value, x);
    place(b, b.query_norm, query, t), place(b, b.key_norm, key, t);
    for (double& v : value) v = kept_as(layer.shape.kv_bf16, b.clip > 0 ? std::clamp<double>(v, -b.clip, b.clip) : v);
    for (double& v : key) v = kept_as(layer.shape.kv_bf16, v);
    keys.push_back(key), values.push_back(value);
    Doubles mixed = attend(b, query, keys, values);
    if (b.attention_gate.data) {
      const Doubles gate = times(b.attention_gate, x);
      for (size_t i = 0; i < mixed.size(); ++i) mixed[i] *= sigmoid(gate[i]);
    }
    Doubles attended = times(b.output, mixed);
    normalise(b.attention_norm, attended.data(), b.hidden);
    for (int i = 0; i < b.hidden; ++i) h[i] += b.attention_residual * attended[i];
    Doubles y = b.parallel ? x : h;
    normalise(b.ffn_norm, y.data(), b.hidden);
    Row row;
    if (b.router.scores > EXPERTD_SCORES_LOGITS) choose(b.router, y, row);
    Doubles added(b.hidden);
    if (b.ffn.up.data) {
      Doubles up = times(b.ffn.up, y), gate = b.ffn.gate.data ? times(b.ffn.gate, y) : up;
      for (size_t i = 0; i < up.size(); ++i) up[i] = gate[i] * sigmoid(gate[i]) * (b.ffn.gate.data ? up[i] : 1);
      added = times(b.ffn.down, up);
      const double share = b.ffn_gate.data ? sigmoid(times(b.ffn_gate, y)[0]) : 1;
      for (double& v : added) v *= share;
    }
    for (int i = 0; i < b.hidden && b.router.scores; ++i) added[i] += 0.25 * y[i];
    normalise(b.output_norm, added.data(), b.hidden);
    for (int i = 0; i < b.hidden; ++i) h[i] += b.ffn_residual * added[i];
    row.hidden = h, row.normed = y;
    rows.push_back(row);
  }
  return rows;
}

// ---- the kernels -----------------------------------------------------------------------------------------------------

// Sequence 0 in steps of the given lengths, beside `mates` others; every row's hidden, normed, weights and experts.
class Run {
 public:
  Run(const Layer& layer, const Floats& input, int threads) : layer_(layer), block_(layer.block), input_(input) {
    succeeds(expertd_pool_create(threads, &pool_));
    const int64_t token = block_.kv_heads * (block_.key_dim + block_.value_dim) * bytes();
    stride_ = kBlockTokens * token;
    block_.value_offset = int64_t(kBlockTokens) * block_.kv_heads * block_.key_dim * bytes();
    per_sequence_ = (kTokens + kBlockTokens - 1) / kBlockTokens;
    blocks_.resize((1 + (1 + kMates) * per_sequence_) * stride_);
    // What another sequence left behind must not reach this one.
    std::fill(blocks_.begin() + stride_, blocks_.end(), char(0xff));  // NaN
  }
  ~Run() { expertd_pool_destroy(pool_); }

  Floats sequence(const std::vector<int>& cuts, int mates) {
    Floats results;
    int start = 0;
    for (size_t i = 0; i < cuts.size(); ++i) {
      begin();
      for (int mate = 1; mate <= mates; ++mate)
        if (mate % 2) add(mate, lengths_[mate], std::min(1 + int(i + mate) % 3, kTokens - lengths_[mate]));
      const int mine = int(positions_.size());
      add(0, start, cuts[i]);
      for (int mate = 1; mate <= mates; ++mate)
        if (mate % 2 == 0) add(mate, lengths_[mate], std::min(1 + int(i + mate) % 3, kTokens - lengths_[mate]));
      forward();
      collect(mine, cuts[i], results);
      start += cuts[i];
    }
    return results;
  }

 private:
  int64_t bytes() const { return layer_.shape.kv_bf16 ? 2 : 4; }

  void begin() { positions_.clear(), span_row_.clear(), span_table_.clear(), tables_.clear(), hidden_.clear(); }

  void add(int sequence, int start, int length) {
    if (length <= 0) return;
    span_row_.push_back(int64_t(positions_.size()));
    span_table_.push_back(int64_t(tables_.size()));
    for (int b = 0; b * kBlockTokens < start + length; ++b) tables_.push_back(1 + sequence * per_sequence_ + b);
    for (int p = start; p < start + length; ++p) positions_.push_back(p);
    const auto from = input_.begin() + int64_t(start) * block_.hidden;
    hidden_.insert(hidden_.end(), from, from + int64_t(length) * block_.hidden);
    lengths_[sequence] = start + length;
  }

  void forward() {
    const int64_t rows = int64_t(positions_.size()), width = block_.hidden;
    span_row_.push_back(rows);
    const expertd_router& r = block_.router;
    normed_.assign(rows * width, 0), added_.assign(rows * width, 0), logits_.assign(rows * r.experts, 0);
    experts_.assign(rows * r.top_k, 0), weights_.assign(rows * r.top_k, 0);
    const expertd_step step{rows, positions_.data(), int64_t(span_row_.size()) - 1, span_row_.data(), span_table_.data(),
                            tables_.data(), blocks_.data(), stride_, kBlockTokens,
                            layer_.shape.kv_bf16 ? EXPERTD_BF16 : EXPERTD_F32, hidden_.data(), normed_.data(),
                            added_.data(), logits_.data(), experts_.data(), weights_.data()};
    succeeds(expertd_block_forward(pool_, &block_, nullptr, nullptr, nullptr, &step));
    Floats routed;
    for (float y : normed_) routed.push_back(stand_in(y));
    succeeds(expertd_block_finish(pool_, &block_, nullptr, r.scores ? routed.data() : nullptr, &step));
    if (r.scores) expect(std::all_of(routed.begin(), routed.end(), [](float v) { return v == 0; }), "sums are not zeroed");
  }

  void collect(int64_t first, int64_t count, Floats& results) const {
    const int64_t width = block_.hidden, top_k = block_.router.top_k;
    for (int64_t row = first; row < first + count; ++row) {
      results.insert(results.end(), &hidden_[row * width], &hidden_[row * width] + width);
      results.insert(results.end(), &normed_[row * width], &normed_[row * width] + width);
      if (block_.router.scores <= EXPERTD_SCORES_LOGITS) continue;
      results.insert(results.end(), &weights_[row * top_k], &weights_[row * top_k] + top_k);
      for (int64_t k = 0; k < top_k; ++k) results.push_back(float(experts_[row * top_k + k]));
    }
  }

  const Layer& layer_;
  expertd_block block_;
  const Floats& input_;
  expertd_pool* pool_ = nullptr;
  int64_t stride_;
  int per_sequence_;
  int lengths_[1 + kMates] = {};
  std::vector<char> blocks_;
  std::vector<int64_t> positions_, span_row_, span_table_, experts_;
  std::vector<int32_t> tables_;
  Floats hidden_, normed_, added_, logits_, weights_;
};

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

double worst_error(const Layer& layer, const Floats& ours, const std::vector<Row>& rows) {
  double worst = 0;
  const float* at = ours.data();
  for (const Row& row : rows) {
    for (const Doubles* part : {&row.hidden, &row.normed, &row.weights})
      for (double expected : *part) worst = std::max(worst, std::abs(*at++ - expected));
    for (int expert : row.experts) expect(int(*at++) == expert, layer.shape.name + ": other experts were chosen");
  }
  expect(at == ours.data() + ours.size(), "rows are missing");
  return worst;
}

void check_shape(const Shape& shape, const std::vector<std::string>& instruction_sets) {
  const Layer layer(shape);
  const Floats input = random_floats(size_t(kTokens) * shape.hidden);
  Floats whole;
  for (const std::string& name : instruction_sets) {
    succeeds(expertd_isa_use(name.c_str()));
    const Floats ours = Run(layer, input, 1).sequence({kTokens}, 0);
    if (whole.empty()) {
      whole = ours;
      const double error = worst_error(layer, ours, reference(layer, input, kTokens));
      // Rounding a key to bfloat16 may fall to the other side than in double precision.
      const double allowed = shape.kv_bf16 ? 2e-2 : 2e-5;
      expect(error <= allowed, shape.name + ": differs by " + std::to_string(error));
    }
    expect(same_bits(ours, whole), shape.name + ": other bits on " + name);
    expect(same_bits(Run(layer, input, 3).sequence({1, 63, 2, 20, 1, 1, 40, 22}, 0), whole), shape.name + ": other bits in steps on " + name);
    expect(same_bits(Run(layer, input, 2).sequence(std::vector<int>(kTokens, 1), kMates), whole), shape.name + ": other bits beside others on " + name);
  }
  check::remember(whole);
}

std::vector<Shape> shapes() {
  const auto made = [](const char* name, const std::function<void(Shape&)>& change) {
    Shape shape;
    shape.name = name;
    change(shape);
    return shape;
  };
  return {
      made("plain", [](Shape&) {}),
      made("bf16 keys", [](Shape& s) { s.kv_bf16 = true, s.head_norm = 1, s.scores = EXPERTD_SCORES_CHOSEN; }),
      made("window and sinks", [](Shape& s) { s.window = 21, s.sinks = true, s.ffn = 0, s.shares = 1; }),
      made("window of one", [](Shape& s) { s.window = 1, s.rope = EXPERTD_ROPE_NONE; }),
      made("wide window", [](Shape& s) { s.window = 100, s.kv_heads = 4, s.kv_bf16 = true, s.sinks = true; }),
      made("odd sizes", [](Shape& s) {
        s.hidden = 37, s.key_dim = 20, s.value_dim = 13, s.rotary_dim = 6, s.inner = 19, s.experts = 7, s.top_k = 7;
        s.rope = EXPERTD_ROPE_PAIRS, s.head_norm = 2, s.layer_norms = true, s.heads = 6, s.kv_heads = 1;
      }),
      made("norms after", [](Shape& s) { s.norm_after_rope = true, s.head_norm = 1, s.sandwich = true, s.clip = 0.7f; }),
      made("side by side", [](Shape& s) { s.parallel = true, s.layer_norms = true, s.residual = 0.6f, s.ffn_gate = true; }),
      made("gates", [](Shape& s) { s.attention_gate = true, s.value_dim = 40, s.key_dim = 96, s.rotary_dim = 48; }),
      made("dense", [](Shape& s) { s.scores = EXPERTD_SCORES_DENSE, s.experts = s.top_k = 0, s.ffn = 2; }),
      made("groups", [](Shape& s) {
        s.scores = EXPERTD_SCORES_SIGMOID, s.groups = 4, s.groups_kept = 2, s.group_best = 2, s.bias = true;
        s.shares = 1, s.router_scale = 2.5f, s.ffn = 0;
      }),
  };
}

}  // namespace

int main() {
  const std::vector<std::string> available = check::instruction_sets();
  for (const Shape& shape : shapes()) check_shape(shape, available);
  return check::report();
}
