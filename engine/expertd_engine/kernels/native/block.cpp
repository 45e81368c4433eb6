// One decoder layer as a sequence of phases: the caller's thread runs this code, every phase uses all threads.
//
// Each phase writes rows that depend on their own row of the phase before, or, in attention, on the keys and values of
// their own sequence; so a token's bits do not depend on what else is in the step.
#include "block.h"

#include <algorithm>
#include <cstring>

#include "block_kernels.h"
#include "isa.h"
#include "phases.h"

namespace expertd {

const BlockKernels& block_kernels() {
#if defined(__x86_64__)
  if (&isa() == &kAvx512) return block_avx512;
  if (&isa() == &kAvx2) return block_avx2;
#elif defined(__aarch64__)
  if (&isa() == &kNeon) return block_neon;
#endif
  return block_portable;
}

namespace {

constexpr int32_t kAttentionRows = 48;  // query rows that read a key tile while it is in the cache

class Layer {
 public:
  Layer(Pool& pool, const expertd_block& block, const expertd_step& step)
      : pool_(pool), kernels_(block_kernels()), block_(block), step_(step), rows_(step.rows) {}

  void forward(const expertd_block* previous, float* routed);
  static void finish_row(const expertd_block& block, const expertd_step& step, float* routed, int64_t row);

 private:
  void project();
  void place_row(int64_t row);
  void place_heads(float* heads, int32_t count, int32_t dim, const expertd_norm& norm, int64_t row);
  void place_rows();
  void attend();
  void attend_item(int64_t span, int64_t first, int64_t count, int32_t head, int thread);
  void mix();
  void route();

  template <class T>
  T* scratch(int64_t count) {
    return pool_.scratch().get<T>(count);
  }

  Pool& pool_;
  const BlockKernels& kernels_;
  const expertd_block& block_;
  const expertd_step& step_;
  const int64_t rows_;
  float *x_ = nullptr, *query_ = nullptr, *key_ = nullptr, *value_ = nullptr, *gate_ = nullptr, *mixed_ = nullptr;
  int64_t* blocks_ = nullptr;  // [rows]: the KV block of each row
  float* work_ = nullptr;      // attention's scratch, a part for each thread
  int64_t work_floats_ = 0;
};

// h += ffn_residual * output_norm(routed + added), of the layer that is over.
void Layer::finish_row(const expertd_block& block, const expertd_step& step, float* routed, int64_t row) {
  const int64_t width = block.hidden;
  float* const hidden = step.hidden + row * width;
  float* const added = step.added + row * width;
  const bool has_ffn = block.ffn.up.data != nullptr;
  if (routed) {
    float* const sums = routed + row * width;
    for (int64_t i = 0; i < width; ++i) added[i] = has_ffn ? sums[i] + added[i] : sums[i];
    std::memset(sums, 0, size_t(width) * sizeof(float));
  }
  if (block.output_norm.kind) block_kernels().norm(block.output_norm, added, added);
  for (int64_t i = 0; i < width; ++i) hidden[i] += added[i] * block.ffn_residual;
}

void Layer::forward(const expertd_block* previous, float* routed) {
  const int64_t width = block_.hidden;
  x_ = block_.parallel ? step_.normed : scratch<float>(rows_ * width);
  for_rows(pool_, rows_, width, [&](int64_t row) {
    if (previous) finish_row(*previous, step_, routed, row);
    const float* from = step_.hidden + row * width;
    if (block_.input_norm.kind)
      kernels_.norm(block_.input_norm, from, x_ + row * width);
    else
      std::copy(from, from + width, x_ + row * width);
  });
  project();
  place_rows();
  attend();
  mix();
  route();
}

void Layer::project() {
  query_ = scratch<float>(rows_ * block_.query.rows);
  key_ = scratch<float>(rows_ * block_.key.rows);
  value_ = scratch<float>(rows_ * block_.value.rows);
  mixed_ = scratch<float>(rows_ * block_.output.cols);
  if (block_.attention_gate.data) gate_ = scratch<float>(rows_ * block_.attention_gate.rows);
  Readers readers(pool_, x_, rows_, block_.hidden);
  readers.add(block_.query, query_);
  readers.add(block_.key, key_);
  readers.add(block_.value, value_);
  readers.add(block_.attention_gate, gate_);
  readers.run();
}

// Norm and rotation of a row's heads, in the layer's order.
void Layer::place_heads(float* heads, int32_t count, int32_t dim, const expertd_norm& norm, int64_t row) {
  const auto normalise = [&] {
    if (!norm.kind) return;
    for (int64_t i = 0; i < int64_t(count) * dim; i += norm.length) kernels_.norm(norm, heads + i, heads + i);
  };
  if (!block_.norm_after_rope) normalise();
  if (block_.clip > 0)
    for (int64_t i = 0; i < int64_t(count) * dim; ++i) heads[i] = std::clamp(heads[i], -block_.clip, block_.clip);
  if (block_.rope) {
    const int64_t angles = step_.positions[row] * (block_.rotary_dim / 2);
    for (int32_t head = 0; head < count; ++head)
      kernels_.rotate(block_.rope, block_.rotary_dim, block_.cos + angles, block_.sin + angles,
                      heads + int64_t(head) * dim);
  }
  if (block_.norm_after_rope) normalise();
}

void Layer::place_row(int64_t row) {
  const expertd_block& b = block_;
  float* const query = query_ + row * b.query.rows;
  float* const key = key_ + row * b.key.rows;
  float* const value = value_ + row * b.value.rows;
  place_heads(query, b.heads, b.key_dim, b.query_norm, row);
  place_heads(key, b.kv_heads, b.key_dim, b.key_norm, row);
  for (int64_t i = 0; i < b.query.rows; ++i) query[i] *= b.scale;
  if (b.clip > 0)
    for (int64_t i = 0; i < b.value.rows; ++i) value[i] = std::clamp(value[i], -b.clip, b.clip);
  const int64_t tokens = step_.block_tokens, bytes = step_.kv_format == EXPERTD_F32 ? 4 : 2;
  const auto write = bytes == 4 ? kernels_.write_f32 : kernels_.write_bf16;
  char* const base = step_.blocks + blocks_[row] * step_.block_stride;
  const int64_t inside = step_.positions[row] % tokens;
  for (int64_t head = 0; head < b.kv_heads; ++head) {
    char* const keys = base + b.key_offset + (head * b.key_dim * tokens + inside) * bytes;
    write(key + head * b.key_dim, b.key_dim, tokens, keys);
    char* const values = base + b.value_offset + (head * tokens + inside) * b.value_dim * bytes;
    write(value + head * b.value_dim, b.value_dim, 1, values);
  }
}

void Layer::place_rows() {
  blocks_ = scratch<int64_t>(rows_);
  for (int64_t span = 0; span < step_.spans; ++span)
    for (int64_t row = step_.span_row[span]; row < step_.span_row[span + 1]; ++row)
      blocks_[row] = step_.tables[step_.span_table[span] + step_.positions[row] / step_.block_tokens];
  for_rows(pool_, rows_, 4 * (block_.query.rows + block_.key.rows), [&](int64_t row) { place_row(row); });
}

// Items are (sequence, positions, key head), the longest first.
void Layer::attend() {
  struct Item {
    int64_t span, first, count;
  };
  const int32_t group = block_.heads / block_.kv_heads;
  const int64_t tile = std::max(1, kAttentionRows / group);
  Item* const items = scratch<Item>(rows_);
  int64_t count = 0;
  for (int64_t span = 0; span < step_.spans; ++span)
    for (int64_t end = step_.span_row[span + 1]; end > step_.span_row[span]; end -= tile) {
      const int64_t first = std::max(step_.span_row[span], end - tile);
      items[count++] = {span, first, end - first};
    }
  work_floats_ = tile * group * block_.key_dim + attention_scratch(tile * group, block_.value_dim);
  work_ = scratch<float>(work_floats_ * pool_.threads());
  pool_.parallel_for(count * block_.kv_heads, [&](int64_t task, int thread) {
    const Item& item = items[task / block_.kv_heads];
    attend_item(item.span, item.first, item.count, int32_t(task % block_.kv_heads), thread);
  });
}

void Layer::attend_item(int64_t span, int64_t first, int64_t count, int32_t head, int thread) {
  const expertd_block& b = block_;
  const int32_t group = b.heads / b.kv_heads;
  const int64_t tokens = step_.block_tokens, bytes = step_.kv_format == EXPERTD_F32 ? 4 : 2;
  float* const query = work_ + thread * work_floats_;
  const int64_t width = int64_t(group) * b.key_dim;
  for (int64_t i = 0; i < count; ++i) {
    const float* from = query_ + (first + i) * b.query.rows + head * width;
    std::copy(from, from + width, query + i * width);
  }
  AttentionWork work;
  work.query = query;
  work.sinks = b.sinks ? b.sinks + head * int64_t(group) : nullptr;
  work.table = step_.tables + step_.span_table[span];
  work.keys = step_.blocks + b.key_offset + head * b.key_dim * tokens * bytes;
  work.values = step_.blocks + b.value_offset + head * b.value_dim * tokens * bytes;
  work.block_stride = step_.block_stride;
  work.first = step_.positions[first];
  work.known = step_.positions[step_.span_row[span + 1] - 1] + 1;
  work.window = b.window;
  work.block_tokens = step_.block_tokens;
  work.rows = int32_t(count) * group;
  work.group = group;
  work.key_dim = b.key_dim;
  work.value_dim = b.value_dim;
  work.out_stride = b.output.cols;
  work.out = mixed_ + first * work.out_stride + int64_t(head) * group * b.value_dim;
  work.scratch = query + int64_t(work.rows) * b.key_dim;
  (step_.kv_format == EXPERTD_F32 ? kernels_.attend_f32 : kernels_.attend_bf16)(work);
}

// The output projection, its residual, and what the FFN reads.
void Layer::mix() {
  const int64_t width = block_.hidden;
  if (gate_)
    for_rows(pool_, rows_, block_.output.cols, [&](int64_t row) {
      kernels_.gate(gate_ + row * block_.output.cols, block_.output.cols, mixed_ + row * block_.output.cols);
    });
  float* const attended = scratch<float>(rows_ * width);
  multiply(pool_, block_.output, mixed_, rows_, attended);
  for_rows(pool_, rows_, width, [&](int64_t row) {
    float* const from = attended + row * width;
    float* const hidden = step_.hidden + row * width;
    float* const normed = step_.normed + row * width;
    if (block_.attention_norm.kind) kernels_.norm(block_.attention_norm, from, from);
    for (int64_t i = 0; i < width; ++i) hidden[i] += from[i] * block_.attention_residual;
    if (block_.parallel) return;
    if (block_.ffn_norm.kind)
      kernels_.norm(block_.ffn_norm, hidden, normed);
    else
      std::copy(hidden, hidden + width, normed);
  });
}

// Routes of the experts, and what every token shares.
void Layer::route() {
  const expertd_ffn& ffn = block_.ffn;
  const int64_t inner = ffn.up.data ? ffn.up.rows : 0;
  float* const up = scratch<float>(rows_ * inner);
  float* const gate = ffn.gate.data ? scratch<float>(rows_ * inner) : nullptr;
  float* const share = block_.ffn_gate.data ? scratch<float>(rows_) : nullptr;
  const expertd_router& router = block_.router;
  const bool selects = router.scores > EXPERTD_SCORES_LOGITS && router.scores != EXPERTD_SCORES_GIVEN;
  const int64_t selecting = select_scratch(router);
  float* const work = selects ? scratch<float>(rows_ * selecting) : nullptr;
  Readers readers(pool_, step_.normed, rows_, block_.hidden);
  readers.add(router.matrix, step_.logits);
  readers.add(ffn.gate, gate);
  readers.add(ffn.up, up);
  readers.add(block_.ffn_gate, share);
  readers.run();
  const Activation activation{ffn.activation, ffn.alpha, ffn.limit};
  for_rows(pool_, rows_, 4 * inner + 8 * router.experts, [&](int64_t row) {
    if (selects)
      kernels_.select(router, step_.logits + row * router.experts, nullptr, work + row * selecting,
                      step_.experts + row * router.top_k, step_.weights + row * router.top_k);
    if (inner) isa().activate(activation, gate ? gate + row * inner : nullptr, up + row * inner, inner);
  });
  if (!inner) return;
  multiply(pool_, ffn.down, gate ? gate : up, rows_, step_.added);
  if (!share) return;
  for_rows(pool_, rows_, block_.hidden, [&](int64_t row) {
    float one[1] = {1.0f};
    kernels_.gate(share + row, 1, one);
    for (int64_t i = 0; i < block_.hidden; ++i) step_.added[row * block_.hidden + i] *= one[0];
  });
}

}  // namespace

void layer_forward(Pool& pool, const expertd_block& block, const expertd_block* previous, float* routed,
                   const expertd_step& step) {
  Layer(pool, block, step).forward(previous, routed);
}

void layer_finish(Pool& pool, const expertd_block& block, float* routed, const expertd_step& step) {
  for_rows(pool, step.rows, block.hidden, [&](int64_t row) { Layer::finish_row(block, step, routed, row); });
}

void head_logits(Pool& pool, const expertd_norm& norm, const expertd_matrix& head, float scale, const float* hidden,
                 const int64_t* rows, int64_t count, float* logits) {
  const int64_t width = norm.length;
  float* const normed = pool.scratch().get<float>(count * width);
  for_rows(pool, count, width,
           [&](int64_t i) { block_kernels().norm(norm, hidden + rows[i] * width, normed + i * width); });
  multiply(pool, head, normed, count, logits);
  if (scale == 1.0f) return;
  for_rows(pool, count, head.rows, [&](int64_t i) {
    for (int64_t v = i * head.rows; v < (i + 1) * head.rows; ++v) logits[v] *= scale;
  });
}

}  // namespace expertd
