// All routed experts of a layer in one call: gate, up, activation and requantisation in one phase, down and the
// weighted sum in the next. Both split rows of weights, never tokens' sums, so that every sum has one order.
#include <algorithm>

#include "isa.h"
#include "linear.h"
#include "moe.h"
#include "row_order.h"

namespace expertd {
namespace {

constexpr int64_t kBatchBytes = 8 << 20;   // inner activations held at a time; more pairs go in several rounds
constexpr int kBlockRows = kGroupColumns;  // most inner rows of a task: they make exactly one group of down's input
static_assert(kBlockRows == kUnitRows, "a task calls one kernel for each matrix");
constexpr int64_t kMostUnits = 2;          // units of down per task: their inputs are read once for all of them
constexpr int64_t kFewTasks = 4;           // of the first phase for each thread; for fewer, tasks are halved

// Pairs of one expert within a round.
struct Segment {
  const std::byte* record;
  int64_t begin, end;
  int64_t tasks_before;
  int64_t cut;  // its first inner neuron
};

// What one round works on: at most kBatchBytes of inner activations.
struct Round {
  const Segment* segments;
  int count;
  int64_t first_pair;
  int64_t tasks;  // of the first phase
  std::byte* inner;
  int64_t inner_stride;
  float* plain;  // [pairs, inner]: what is quantised between the phases, if tasks are halved
};

// Tasks of the first phase, each a block of kBlockRows inner rows for at most `rows` pairs.
int64_t count_tasks(const expertd_moe_call& arguments, const int32_t* cuts, int64_t rows) {
  int64_t count = 0;
  for (int32_t expert = 0; expert < arguments.num_experts; ++expert) {
    const int64_t pairs = arguments.pair_begin[expert + 1] - arguments.pair_begin[expert];
    count += ceil_div(arguments.layout->inner - (cuts ? cuts[expert] : 0), kBlockRows) * ceil_div(pairs, rows);
  }
  return count;
}

class Moe {
 public:
  Moe(Pool& pool, const expertd_moe_call& arguments, const int32_t* cuts, const Inputs& inputs)
      : pool_(pool),
        a_(arguments),
        cuts_(cuts),
        layout_(*arguments.layout),
        inputs_(inputs),
        inner_stride_(input_bytes(layout_.format, layout_.inner)),
        halves_(!is_float_format(layout_.format) && pool.threads() > 1 &&
                count_tasks(arguments, cuts, rows_per_block(inputs.stride)) < kFewTasks * pool.threads()),
        block_rows_(halves_ || (is_float_format(layout_.format) && !cuts) ? kStripRows : kBlockRows),
        blocks_(ceil_div(layout_.inner, block_rows_)),
        block_bytes_(block_rows_ / kStripRows * strip_bytes(layout_.format, layout_.hidden)),
        down_unit_bytes_(kUnitStrips * strip_bytes(layout_.format, layout_.inner)),
        rows_per_block_(rows_per_block(inputs.stride)),
        round_pairs_(std::max<int64_t>(kTile, kBatchBytes / inner_stride_)),
        by_rows_(layout_.order == EXPERTD_ROWS && !is_float_format(layout_.format)),
        gathers_(layout_.order == EXPERTD_ROWS && (by_rows_ || cuts != nullptr)),
        turned_bytes_(std::max(block_bytes_, down_unit_bytes_)) {}

  void run() {
    const int64_t pairs = a_.pair_begin[a_.num_experts];
    const int64_t most = std::min(pairs - a_.pair_begin[0], round_pairs_);
    auto* segments = pool_.scratch().get<Segment>(a_.num_experts);
    auto* inner = pool_.scratch().get<std::byte>(most * inner_stride_);
    auto* plain = halves_ ? pool_.scratch().get<float>(most * layout_.inner) : nullptr;
    if (gathers_) turned_ = pool_.scratch().get<std::byte>(pool_.threads() * turned_bytes_);
    int64_t pair = a_.pair_begin[0];
    for (int32_t expert = 0; pair < pairs;) {
      Round round{segments, 0, pair, 0, inner, inner_stride_, plain};
      const int64_t round_end = std::min(pairs, pair + round_pairs_);
      while (pair < round_end) {
        while (a_.pair_begin[expert + 1] <= pair) ++expert;
        const int64_t end = std::min<int64_t>(round_end, a_.pair_begin[expert + 1]);
        const int64_t cut = cuts_ ? cuts_[expert] : 0;
        segments[round.count++] = {static_cast<const std::byte*>(a_.records[expert]), pair, end, round.tasks, cut};
        round.tasks += (blocks_ - cut / block_rows_) * ceil_div(end - pair, rows_per_block_);
        pair = end;
      }
      pool_.parallel_for(round.tasks, [&](int64_t task, int thread) { inner_task(round, task, thread); });
      if (halves_) pool_.parallel_for(round.count, [&](int64_t nth) { quantise(round, round.segments[nth]); });
      const int64_t units = ceil_div(layout_.hidden, kUnitRows);
      const int64_t chunk = std::clamp<int64_t>(units / (8 * pool_.threads()), 1, kMostUnits);
      pool_.parallel_for(ceil_div(units, chunk), [&](int64_t task, int thread) {
        down_task(round, task * chunk, std::min(units, (task + 1) * chunk), thread);
      });
    }
  }

 private:
  static const float* floats_at(const Segment& segment, int64_t offset) {
    return offset < 0 ? nullptr : reinterpret_cast<const float*>(segment.record + offset);
  }

  // Rows `first` to `first` + `wanted` of the `rows` x `cols` matrix at an offset, from column `first_col` on, as
  // kernels read them: a record that lies as GPUs read it is turned on the way, a unit at a time, in memory of the
  // thread's own, and so are rows of which a part is read. `then`: the offset of the matrix whose same rows are read
  // next; -1: those that follow are.
  const std::byte* unit(const Segment& segment, int64_t matrix, int64_t then, int64_t rows, int64_t cols, int64_t first,
                        int64_t wanted, int64_t first_col, int thread) const {
    const std::byte* const begin = segment.record + matrix;
    if (!by_rows_ && first_col == 0) return begin + first / kStripRows * strip_bytes(layout_.format, cols);
    std::byte* const strips = turned_ + thread * turned_bytes_;
    if (by_rows_) {
      const std::byte* const following = then < 0 ? nullptr : segment.record + then;
      strips_of_rows(layout_.format, begin, rows, cols, first, wanted, first_col, following, strips);
    } else {
      ends_of_rows(layout_.format, begin, rows, cols, first, first_col, strips);
    }
    return strips;
  }

  // Up to kTile pairs from `pair` on: their inputs.
  int gather(int64_t pair, int64_t end, const void** inputs) const {
    const int count = static_cast<int>(std::min<int64_t>(kTile, end - pair));
    for (int t = 0; t < count; ++t) inputs[t] = inputs_.row(a_.pair_row[pair + t]);
    return count;
  }

  // One block of inner rows of one expert, for a block of its pairs.
  void inner_task(const Round& round, int64_t task, int thread) const {
    const Segment* segment = round.segments;
    int count = round.count;
    while (count > 1) {  // the last segment that begins at or before the task
      const int half = count / 2;
      if (segment[half].tasks_before <= task) {
        segment += half;
        count -= half;
      } else {
        count = half;
      }
    }
    const int64_t local = task - segment->tasks_before, skipped = segment->cut / block_rows_;
    const int64_t begin = segment->begin + local / (blocks_ - skipped) * rows_per_block_;
    const int64_t end = std::min(segment->end, begin + rows_per_block_);
    for (int64_t pair = begin; pair < end; pair += kTile) {
      inner_tile(round, *segment, skipped + local % (blocks_ - skipped), pair, end, thread);
    }
  }

  void inner_tile(const Round& round, const Segment& segment, int64_t block, int64_t pair, int64_t end,
                  int thread) const {
    const int64_t first = block * block_rows_;
    const int valid = static_cast<int>(std::min<int64_t>(block_rows_, layout_.inner - first));
    const bool gated = layout_.gate >= 0;
    const void* inputs[kTile];
    const int count = gather(pair, end, inputs);
    float gate[kTile][kBlockRows], up[kTile][kBlockRows];
    if (gated) {
      project(segment, layout_.gate, layout_.gate_bias, layout_.up, first, valid, inputs, count, gate, thread);
    }
    // After up comes, for whoever takes it, the next block.
    const int64_t next_block = (gated ? layout_.gate : layout_.up) + block_bytes_;
    project(segment, layout_.up, layout_.up_bias, next_block, first, valid, inputs, count, up, thread);
    const Activation activation{layout_.activation, layout_.alpha, layout_.limit};
    for (int t = 0; t < count; ++t) {
      isa().activate(activation, gated ? gate[t] : nullptr, up[t], valid);
      const float* const made = gated ? gate[t] : up[t];
      const int64_t place = pair + t - round.first_pair;
      if (halves_) {
        std::copy_n(made, valid, round.plain + place * layout_.inner + first);
      } else {
        std::byte* row = round.inner + place * round.inner_stride;
        prepare_row(layout_.format, made, valid, row + input_bytes(layout_.format, first));
      }
    }
  }

  // A segment's inner rows, which two tasks have made of each group.
  void quantise(const Round& round, const Segment& segment) const {
    for (int64_t pair = segment.begin - round.first_pair; pair < segment.end - round.first_pair; ++pair) {
      std::byte* row = round.inner + pair * round.inner_stride + input_bytes(layout_.format, segment.cut);
      const float* from = round.plain + pair * layout_.inner + segment.cut;
      prepare_row(layout_.format, from, layout_.inner - segment.cut, row);
    }
  }

  // out[t][i] = inner row first + i of the matrix at offset `matrix`, with its bias. `then`: the offset of the matrix
  // whose same rows are read next; of those that are turned, turning fetches what comes next.
  void project(const Segment& segment, int64_t matrix, int64_t bias, int64_t then, int64_t first, int valid,
               const void* const* inputs, int count, float (*out)[kBlockRows], int thread) const {
    const int64_t same_rows = matrix == layout_.up ? -1 : layout_.up;
    const std::byte* const weights =
        unit(segment, matrix, same_rows, layout_.inner, layout_.hidden, first, block_rows_, 0, thread);
    const std::byte* const next = by_rows_ ? weights : segment.record + first / block_rows_ * block_bytes_ + then;
    isa().unit[layout_.format](weights, next, layout_.hidden, valid, inputs, count, out[0]);
    const float* biases = floats_at(segment, bias);
    if (!biases) return;
    for (int t = 0; t < count; ++t) {
      for (int i = 0; i < valid; ++i) out[t][i] += biases[first + i];
    }
  }

  // Units of down of all experts, in ascending order: nobody else writes these columns.
  void down_task(const Round& round, int64_t begin, int64_t end, int thread) const {
    for (int i = 0; i < round.count; ++i) {
      const Segment& segment = round.segments[i];
      const std::byte* next = i + 1 < round.count ? down_unit(round.segments[i + 1], begin)
                                                  : down_unit(round.segments[0], end);
      for (int64_t pair = segment.begin; pair < segment.end; pair += kTile) {
        const void* inputs[kTile];
        const int count = static_cast<int>(std::min<int64_t>(kTile, segment.end - pair));
        for (int t = 0; t < count; ++t) {
          inputs[t] = round.inner + (pair + t - round.first_pair) * round.inner_stride +
                      input_bytes(layout_.format, segment.cut);
        }
        for (int64_t unit = begin; unit < end; ++unit) {
          const std::byte* then = unit + 1 < end ? down_unit(segment, unit + 1) : next;
          down_tile(segment, unit, then, pair, inputs, count, thread);
        }
      }
    }
  }

  const std::byte* down_unit(const Segment& segment, int64_t unit) const {
    return segment.record + layout_.down + unit * down_unit_bytes_;
  }

  void down_tile(const Segment& segment, int64_t unit, const std::byte* then, int64_t pair, const void* const* inputs,
                 int count, int thread) const {
    const int64_t first = unit * kUnitRows, hidden = layout_.hidden;
    const int rows = static_cast<int>(std::min<int64_t>(kUnitRows, hidden - first));
    const float* bias = segment.cut > 0 ? nullptr : floats_at(segment, layout_.down_bias);
    float sums[kTile * kUnitRows];
    const std::byte* const weights =
        this->unit(segment, layout_.down, -1, hidden, layout_.inner, first, kUnitRows, segment.cut, thread);
    const std::byte* const next = by_rows_ ? weights : then;
    isa().unit[layout_.format](weights, next, layout_.inner - segment.cut, rows, inputs, count, sums);
    for (int t = 0; t < count; ++t) {
      const float weight = a_.pair_weight[pair + t];
      const float* sum = sums + t * kUnitRows;
      float part[kUnitRows];
      for (int r = 0; r < rows; ++r) part[r] = weight * (bias ? sum[r] + bias[first + r] : sum[r]);
      if (a_.partials != nullptr) {
        std::copy_n(part, rows, a_.partials + (pair + t) * hidden + first);
      } else {
        float* out = a_.out + a_.pair_row[pair + t] * hidden + first;
        for (int r = 0; r < rows; ++r) out[r] += part[r];
      }
    }
  }

  Pool& pool_;
  const expertd_moe_call& a_;
  const int32_t* const cuts_;
  const expertd_expert_layout& layout_;
  const Inputs inputs_;
  const int64_t inner_stride_;
  const bool halves_;         // whether two tasks make a group of down's input, which is quantised behind them
  const int64_t block_rows_;  // inner rows of a task: floats have no groups, and small experts make few tasks
  const int64_t blocks_, block_bytes_, down_unit_bytes_, rows_per_block_, round_pairs_;
  const bool by_rows_, gathers_;
  const int64_t turned_bytes_;
  std::byte* turned_ = nullptr;  // a unit for each thread, where records lie as GPUs read them
};

}  // namespace

void run_moe(Pool& pool, const expertd_moe_call& experts, const int32_t* cuts) {
  const expertd_expert_layout& layout = *experts.layout;
  const Inputs inputs = prepare_inputs(pool, layout.format, experts.x, experts.tokens, layout.hidden, layout.hidden);
  Moe(pool, experts, cuts, inputs).run();
}

}  // namespace expertd
