// The strip kernels and the quantisation of inputs, on Lanes and Rows. Include after a lanes_*.h.
//
// The arithmetic of an output element is fixed here, once, for every instruction set, tile and batch:
//   float formats    16 partial sums (columns k = lane mod 16, ascending, fused), then halves on halves;
//   integer formats  exact sums within a group; groups ascending: acc = fma(d * s, sum, acc), and for INT4
//                    acc = fma(m * s, sum of a, acc) after it.
#pragma once

#include "expertd_kernels.h"
#include "formats.h"
#include "isa.h"
#include "lane_math.h"

namespace expertd {
namespace {

// One row of x as groups. A group whose scale would be subnormal becomes zeros; one with a value that is not finite
// keeps a scale that is not, so that every sum over it says so.
void quantise(const float* x, int64_t cols, int32_t factor, Group* out) {
  for (int64_t k = 0; k < cols; k += kGroupColumns, ++out) {
    const int n = static_cast<int>(cols - k < kGroupColumns ? cols - k : kGroupColumns);
    const Lanes a = n >= 16 ? load(x + k) : load_first(x + k, n);
    const Lanes b = n == 32 ? load(x + k + 16) : n > 16 ? load_first(x + k + 16, n - 16) : broadcast(0.0f);
    const float largest = largest_magnitude(a, b);
    const float scale = largest / 127.0f;
    if (scale >= 0x1p-126f && scale <= 3e38f) {
      const Lanes by = broadcast(scale);
      out->scale = scale;
      out->correction = factor * store_bytes(out->q, nearest(a / by), nearest(b / by));
    } else {
      out->scale = largest < 1.0f ? 0.0f : largest;
      out->correction = 0;
      for (auto& q : out->q) q = 0;
    }
  }
}

// ---- float formats --------------------------------------------------------------------------------------------------

template <int R, int T, class Element>
inline void dot_tile(const Element* w, int64_t cols, const void* const* inputs, float* out) {
  Lanes acc[R][T];
  const float* x[T];
  for (int t = 0; t < T; ++t) x[t] = static_cast<const float*>(inputs[t]);
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) acc[r][t] = broadcast(0.0f);
  }
  int64_t k = 0;
  for (; k + 16 <= cols; k += 16) {
    Lanes xs[T];
    for (int t = 0; t < T; ++t) xs[t] = load(x[t] + k);
    for (int r = 0; r < R; ++r) {
      const Lanes ws = load(w + r * cols + k);
      for (int t = 0; t < T; ++t) acc[r][t] = fma(ws, xs[t], acc[r][t]);
    }
  }
  if (k < cols) {
    const int n = static_cast<int>(cols - k);
    for (int r = 0; r < R; ++r) {
      const Lanes ws = load_first(w + r * cols + k, n);
      for (int t = 0; t < T; ++t) acc[r][t] = fma(ws, load_first(x[t] + k, n), acc[r][t]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) out[t * kStripRows + r] = sum(acc[r][t]);
  }
}

template <int T, class Element>
inline void dot_rows(const Element* w, int64_t cols, int rows, const void* const* inputs, float* out) {
  int r = 0;
  for (; r + kDotRows <= rows; r += kDotRows) dot_tile<kDotRows, T>(w + r * cols, cols, inputs, out + r);
  for (; r < rows; ++r) dot_tile<1, T>(w + r * cols, cols, inputs, out + r);
}

template <class Element>
void float_strip(const void* strip, const void* /*then*/, int64_t cols, int rows, const void* const* inputs, int tokens,
                 float* out) {
  const auto* w = static_cast<const Element*>(strip);
  int t = 0;
  for (; t + kDotTokens <= tokens; t += kDotTokens) {
    dot_rows<kDotTokens>(w, cols, rows, inputs + t, out + t * kStripRows);
  }
  for (; t < tokens; ++t) dot_rows<1>(w, cols, rows, inputs + t, out + t * kStripRows);
}

// ---- integer formats ------------------------------------------------------------------------------------------------

template <int format>
inline Weights unpack(const uint8_t* group, int first_row) {
  return format == EXPERTD_INT8 ? unpack_bytes(group, first_row) : unpack_nibbles(group, first_row);
}

// kPassRows rows from `first_row` on, T tokens, all groups.
template <int format, int T>
inline void integer_pass(const uint8_t* strip, const uint8_t* then, int64_t groups, int first_row,
                         const void* const* inputs, float* out) {
  constexpr int64_t kGroupBytes = format == EXPERTD_INT8 ? 512 : 256;
  constexpr int64_t kScaleBytes = format == EXPERTD_INT4 ? 64 : 32;
  constexpr int kOffset = format == EXPERTD_INT8 ? 128 : format == EXPERTD_INT4S ? 8 : 0;
  const auto* scales = reinterpret_cast<const uint16_t*>(strip + groups * kGroupBytes) + first_row;
  const auto* minima = scales + groups * kStripRows;
  constexpr int64_t kAhead = kPrefetchBytes / kGroupBytes;
  const Group* x[T];
  for (int t = 0; t < T; ++t) x[t] = static_cast<const Group*>(inputs[t]);
  Rows acc[T];
  for (int t = 0; t < T; ++t) acc[t] = rows_zero();
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* data = strip + g * kGroupBytes;
    // Data: kPrefetchBytes ahead, and from the end on into the next strip's. Scales and minima: one strip ahead,
    // because a group needs its own at once and they lie at the strip's end.
    const int64_t later = g + kAhead;
    const uint8_t* ahead = later < groups ? strip + later * kGroupBytes : then + (later - groups) * kGroupBytes;
    for (int64_t line = 0; line < kGroupBytes; line += 64) prefetch(ahead + line);
    prefetch(then + groups * kGroupBytes + g * kScaleBytes);
    const Weights w = unpack<format>(data, first_row);
    const Rows d = rows_load_half(scales + g * kStripRows);
    for (int t = 0; t < T; ++t) {
      const Group& a = x[t][g];
      acc[t] = fma(d * rows_broadcast(a.scale), integer_dot<kOffset>(w, a), acc[t]);
    }
    if constexpr (format == EXPERTD_INT4) {
      const Rows m = rows_load_half(minima + g * kStripRows);
      for (int t = 0; t < T; ++t) {
        const Group& a = x[t][g];
        const auto total = static_cast<float>(a.correction);
        acc[t] = fma(m * rows_broadcast(a.scale), rows_broadcast(total), acc[t]);
      }
    }
  }
  for (int t = 0; t < T; ++t) rows_store(out + t * kStripRows + first_row, acc[t]);
}

// `tokens` <= T inputs, by as many as there are.
template <int format, int T>
inline void integer_tile(const uint8_t* strip, const uint8_t* then, int64_t groups, const void* const* inputs,
                         int tokens, float* out) {
  if (tokens == T) {
    for (int row = 0; row < kStripRows; row += kPassRows) {
      integer_pass<format, T>(strip, then, groups, row, inputs, out);
    }
  } else if constexpr (T > 1) {
    integer_tile<format, T - 1>(strip, then, groups, inputs, tokens, out);
  }
}

template <int format>
void integer_strip(const void* strip, const void* then, int64_t cols, int /*rows*/, const void* const* inputs,
                   int tokens, float* out) {
  const int64_t groups = (cols + kGroupColumns - 1) / kGroupColumns;
  const auto* data = static_cast<const uint8_t*>(strip);
  const auto* next = static_cast<const uint8_t*>(then);
  for (int t = 0; t < tokens; t += kIntegerTile) {
    const int count = tokens - t < kIntegerTile ? tokens - t : kIntegerTile;
    integer_tile<format, kIntegerTile>(data, next, groups, inputs + t, count, out + t * kStripRows);
  }
}

constexpr Isa isa_of(const char* name, bool (*runs_here)()) {
  return {name,
          runs_here,
          {float_strip<float>, float_strip<uint16_t>, integer_strip<EXPERTD_INT8>, integer_strip<EXPERTD_INT4>,
           integer_strip<EXPERTD_INT4S>},
          quantise,
          activate};
}

}  // namespace
}  // namespace expertd
