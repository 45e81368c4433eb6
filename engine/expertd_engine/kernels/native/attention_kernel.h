// The attention kernel on Lanes. Include after a lanes_*.h; the unit says how many query rows (EXPERTD_QUERY_ROWS) and
// registers of keys or value dimensions (EXPERTD_KEY_LANES) fit into its registers.
//
// Online softmax in float32 over tiles of kKeyTile keys. A row meets the tiles that hold keys it may see, in ascending
// order, and in each the same sums whatever rows are computed beside it: its bits follow from its position and the keys
// alone. Keys lie transposed in a block, [dim][token], so that sixteen scores are one register and need no sum over
// lanes.
#pragma once

#include "attention.h"
#include "lane_math.h"

namespace expertd {
namespace {

constexpr int kLanes = 16;
constexpr int kGroups = kKeyTile / kLanes;  // groups of sixteen keys; a group lies in one block
constexpr int kRowsAtOnce = EXPERTD_QUERY_ROWS;
constexpr int kGroupsAtOnce = EXPERTD_KEY_LANES;
constexpr float kNever = -__builtin_huge_valf();

// Not the standard library's: an inline function of it, compiled here, might be linked into units for other processors.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
inline void fill(float* from, float* to, float value) {
  for (; from < to; ++from) *from = value;
}

struct AttentionState {
  float *scores, *sums, *best, *total, *scale;
  int64_t sums_stride;
};

template <class T>
struct KeyTile {
  const T* keys[kGroups];
  const T* values[kGroups];
  int64_t start;
  int count;  // keys of the tile that are stored
};

template <class T>
KeyTile<T> key_tile(const AttentionWork& work, int64_t start) {
  KeyTile<T> tile;
  tile.start = start;
  tile.count = int(least(kKeyTile, work.known - start));
  for (int g = 0; g < kGroups; ++g) {
    const int64_t position = start + g * kLanes;
    // Groups beyond the end read block 0, which always exists; their scores are masked and their values not read.
    const int64_t block = position < work.known ? work.table[position / work.block_tokens] : 0;
    const int64_t inside = position % work.block_tokens;
    tile.keys[g] = reinterpret_cast<const T*>(work.keys + block * work.block_stride) + inside;
    tile.values[g] = reinterpret_cast<const T*>(work.values + block * work.block_stride) + inside * work.value_dim;
  }
  return tile;
}

template <int Rows, class T>
void scores_of(const AttentionWork& work, const KeyTile<T>& tile, int row, float* scores) {
  const float* query = work.query + int64_t(row) * work.key_dim;
  for (int first = 0; first < kGroups; first += kGroupsAtOnce) {
    Lanes sums[Rows][kGroupsAtOnce];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int g = 0; g < kGroupsAtOnce; ++g) sums[r][g] = broadcast(0.0f);
    for (int64_t d = 0; d < work.key_dim; ++d) {
      Lanes keys[kGroupsAtOnce];
#pragma GCC unroll 8
      for (int g = 0; g < kGroupsAtOnce; ++g) keys[g] = load(tile.keys[first + g] + d * work.block_tokens);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Lanes q = broadcast(query[r * int64_t(work.key_dim) + d]);
#pragma GCC unroll 8
        for (int g = 0; g < kGroupsAtOnce; ++g) sums[r][g] = fma(keys[g], q, sums[r][g]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int g = 0; g < kGroupsAtOnce; ++g)
        store(scores + r * kKeyTile + (first + g) * kLanes, sums[r][g]);
  }
}

// `Groups` registers of value dimensions from `dim` on; the last may be partial.
template <int Rows, int Groups, bool Partial, class T>
void mix_dims(const AttentionWork& work, const AttentionState& state, const KeyTile<T>& tile, int row, int64_t dim) {
  Lanes sums[Rows][Groups];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int g = 0; g < Groups; ++g)
      sums[r][g] = load(state.sums + (row + r) * state.sums_stride + dim + g * kLanes) *
                     broadcast(state.scale[row + r]);
  for (int t = 0; t < tile.count; ++t) {
    const T* value = tile.values[t / kLanes] + (t % kLanes) * int64_t(work.value_dim) + dim;
    Lanes values[Groups];
#pragma GCC unroll 8
    for (int g = 0; g < Groups; ++g)
      values[g] = Partial ? load_first(value, int(work.value_dim - dim)) : load(value + g * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Lanes share = broadcast(state.scores[(row + r) * int64_t(kKeyTile) + t]);
#pragma GCC unroll 8
      for (int g = 0; g < Groups; ++g) sums[r][g] = fma(values[g], share, sums[r][g]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int g = 0; g < Groups; ++g)
      store(state.sums + (row + r) * state.sums_stride + dim + g * kLanes, sums[r][g]);
}

template <int Rows, class T>
void mix(const AttentionWork& work, const AttentionState& state, const KeyTile<T>& tile, int row) {
  int64_t dim = 0;
  for (; dim + kGroupsAtOnce * kLanes <= work.value_dim; dim += kGroupsAtOnce * kLanes)
    mix_dims<Rows, kGroupsAtOnce, false>(work, state, tile, row, dim);
  for (; dim + kLanes <= work.value_dim; dim += kLanes) mix_dims<Rows, 1, false>(work, state, tile, row, dim);
  if (dim < work.value_dim) mix_dims<Rows, 1, true>(work, state, tile, row, dim);
}

inline Lanes larger(const Lanes& a, const Lanes& b) { return where_negative(a - b, b, a); }

// Turns a row's scores into shares relative to its best score so far; hidden keys have none.
void soften(const AttentionWork& work, const AttentionState& state, int64_t start, int row) {
  float* scores = state.scores + row * int64_t(kKeyTile);
  const int64_t position = work.first + row / work.group;
  const int64_t end = least(kKeyTile, position + 1 - start);
  const int64_t begin = work.window ? most(0, position + 1 - work.window - start) : 0;
  fill(scores, scores + begin, kNever);
  fill(scores + end, scores + kKeyTile, kNever);
  Lanes best = load(scores);
  for (int g = 1; g < kGroups; ++g) best = larger(best, load(scores + g * kLanes));
  float lanes[kLanes];
  store(lanes, best);
  const float old = state.best[row];
  float now = old;
  for (const float score : lanes) now = score > now ? score : now;
  for (int g = 0; g < kGroups; ++g)
    store(scores + g * kLanes, exponential(load(scores + g * kLanes) - broadcast(now)));
  fill(scores, scores + begin, 0.0f);
  fill(scores + end, scores + kKeyTile, 0.0f);
  Lanes total = load(scores);
  for (int g = 1; g < kGroups; ++g) total = total + load(scores + g * kLanes);
  store(lanes, exponential(broadcast(old - now)));
  state.scale[row] = lanes[0];
  state.total[row] = state.total[row] * lanes[0] + sum(total);
  state.best[row] = now;
}

template <int Rows, class T>
void rows_over_tile(const AttentionWork& work, const AttentionState& state, const KeyTile<T>& tile, int row) {
  scores_of<Rows>(work, tile, row, state.scores + row * int64_t(kKeyTile));
  for (int r = 0; r < Rows; ++r) soften(work, state, tile.start, row + r);
  mix<Rows>(work, state, tile, row);
}

template <int Rows, class T>
void last_rows_over_tile(const AttentionWork& work, const AttentionState& state, const KeyTile<T>& tile, int row,
                         int count) {
  if constexpr (Rows > 0) {
    if (count == Rows) return rows_over_tile<Rows>(work, state, tile, row);
    last_rows_over_tile<Rows - 1>(work, state, tile, row, count);
  }
}

AttentionState begin_state(const AttentionWork& work) {
  AttentionState state;
  const int64_t rows = work.rows;
  state.sums_stride = padded_dim(work.value_dim);
  state.scores = work.scratch;
  state.sums = state.scores + rows * kKeyTile;
  state.best = state.sums + rows * state.sums_stride;
  state.total = state.best + rows;
  state.scale = state.total + rows;
  fill(state.sums, state.sums + rows * state.sums_stride, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    // A sink is a key seen first: score as given, no value.
    state.best[r] = work.sinks ? work.sinks[r % work.group] : kNever;
    state.total[r] = work.sinks ? 1.0f : 0.0f;
  }
  return state;
}

void write_out(const AttentionWork& work, const AttentionState& state) {
  for (int64_t r = 0; r < work.rows; ++r) {
    float* out = work.out + (r / work.group) * work.out_stride + (r % work.group) * int64_t(work.value_dim);
    const float* sums = state.sums + r * state.sums_stride;
    const float share = 1.0f / state.total[r];
    for (int64_t d = 0; d < work.value_dim; ++d) out[d] = sums[d] * share;
  }
}

template <class T>
void attend(const AttentionWork& work) {
  const AttentionState state = begin_state(work);
  const int64_t last = work.first + work.rows / work.group - 1;
  const int64_t seen = work.window ? most(0, work.first + 1 - work.window) : 0;
  for (int64_t start = seen / kKeyTile * kKeyTile; start <= last; start += kKeyTile) {
    const KeyTile<T> tile = key_tile<T>(work, start);
    // Positions that see a key of this tile: [start, start + kKeyTile - 1 + window), as far as they are ours.
    const int64_t from = most(start, work.first);
    const int64_t to = work.window ? least(last + 1, start + kKeyTile - 1 + work.window) : last + 1;
    const int end = int(to - work.first) * work.group;
    int row = int(from - work.first) * work.group;
    for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) rows_over_tile<kRowsAtOnce>(work, state, tile, row);
    if (row < end) last_rows_over_tile<kRowsAtOnce - 1>(work, state, tile, row, end - row);
  }
  write_out(work, state);
}

}  // namespace
}  // namespace expertd
