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
#include "turn_kernels.h"

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

constexpr int64_t kFloatsAhead = 2048;  // bytes

// `Fetches`: the weights come from memory, and most of them are not read again before all others have been: fetched
// so, they leave the caches to whatever runs between two steps. On two cores of a Zen 5 a token takes a tenth less.
template <int R, int T, bool Fetches, class Element>
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
      if (Fetches) prefetch_once(reinterpret_cast<const char*>(w + r * cols + k) + kFloatsAhead);
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
    for (int t = 0; t < T; ++t) out[t * kUnitRows + r] = sum(acc[r][t]);
  }
}

template <int T, bool Fetches, class Element>
inline void dot_rows(const Element* w, int64_t cols, int rows, const void* const* inputs, float* out) {
  int r = 0;
  for (; r + kDotRows <= rows; r += kDotRows) dot_tile<kDotRows, T, Fetches>(w + r * cols, cols, inputs, out + r);
  for (; r < rows; ++r) dot_tile<1, T, Fetches>(w + r * cols, cols, inputs, out + r);
}

template <class Element>
void float_unit(const void* strips, const void* /*then*/, int64_t cols, int rows, const void* const* inputs, int tokens,
                float* out) {
  const auto* w = static_cast<const Element*>(strips);
  int t = 1;
  if (tokens < kDotTokens) {
    dot_rows<1, true>(w, cols, rows, inputs, out);
  } else {
    dot_rows<kDotTokens, true>(w, cols, rows, inputs, out);
    t = kDotTokens;
  }
  for (; t + kDotTokens <= tokens; t += kDotTokens) {
    dot_rows<kDotTokens, false>(w, cols, rows, inputs + t, out + t * kUnitRows);
  }
  for (; t < tokens; ++t) dot_rows<1, false>(w, cols, rows, inputs + t, out + t * kUnitRows);
}

// ---- integer formats ------------------------------------------------------------------------------------------------

constexpr int64_t kBlockGroups = 16;  // that all input rows pass over while they are in the first-level cache

// Strips side by side, and those that are read next.
struct Unit {
  const uint8_t *strips, *then;
  int64_t groups, bytes;  // of a strip
};

// Which groups of which rows a pass works on, and whether it is the first that does and so fetches ahead.
struct Part {
  int64_t begin, end;
  int first_row;
  bool fetches;
};

template <int format>
inline Weights unpack(const uint8_t* group, int first_row) {
  return format == EXPERTD_INT8 ? unpack_bytes(group, first_row) : unpack_nibbles(group, first_row);
}

// Inlined by force: GCC takes a function that does nothing but prefetch for one without effect, and drops its calls.
template <int format>
__attribute__((always_inline)) inline void fetch_ahead(const Unit& unit, int strip, int64_t group) {
  constexpr int64_t kGroupBytes = format == EXPERTD_INT8 ? 512 : 256;
  constexpr int64_t kScaleBytes = format == EXPERTD_INT4 ? 64 : 32;
  // Data: kPrefetchBytes ahead, and from the end on into the next strip's. Scales and minima: one unit ahead, because a
  // group needs its own at once and they lie at the strip's end.
  const int64_t later = group + kPrefetchBytes / kGroupBytes;
  const uint8_t* then = unit.then + strip * unit.bytes;
  const uint8_t* ahead = later < unit.groups ? unit.strips + strip * unit.bytes + later * kGroupBytes
                                             : then + (later - unit.groups) * kGroupBytes;
#pragma GCC unroll 1  // measured: unrolled, strips are read up to a tenth slower
  for (int64_t line = 0; line < kGroupBytes; line += 64) prefetch(ahead + line);
  prefetch(then + unit.groups * kGroupBytes + group * kScaleBytes);
}

// kPassRows rows of S strips, T tokens. What an input row's group needs is loaded once for all strips.
template <int format, int S, int T>
inline void integer_pass(const Unit& unit, const Part& part, const void* const* inputs, float* out) {
  constexpr int64_t kGroupBytes = format == EXPERTD_INT8 ? 512 : 256;
  constexpr int kOffset = format == EXPERTD_INT8 ? 128 : format == EXPERTD_INT4S ? 8 : 0;
  const Group* x[T];
  for (int t = 0; t < T; ++t) x[t] = static_cast<const Group*>(inputs[t]);
  Rows acc[S][T];
  for (int s = 0; s < S; ++s) {
    for (int t = 0; t < T; ++t) {
      acc[s][t] = part.begin ? rows_load(out + t * kUnitRows + s * kStripRows + part.first_row) : rows_zero();
    }
  }
  for (int64_t g = part.begin; g < part.end; ++g) {
    if (part.fetches) {
      for (int s = 0; s < S; ++s) fetch_ahead<format>(unit, s, g);
    }
    Weights w[S];
    Rows d[S], m[S];
    for (int s = 0; s < S; ++s) {
      const uint8_t* strip = unit.strips + s * unit.bytes;
      const auto* scales = reinterpret_cast<const uint16_t*>(strip + unit.groups * kGroupBytes) + part.first_row;
      w[s] = unpack<format>(strip + g * kGroupBytes, part.first_row);
      d[s] = rows_load_half(scales + g * kStripRows);
      if constexpr (format == EXPERTD_INT4) m[s] = rows_load_half(scales + (unit.groups + g) * kStripRows);
    }
    for (int t = 0; t < T; ++t) {
      const Group& a = x[t][g];
      const Rows scale = rows_broadcast(a.scale);
      for (int s = 0; s < S; ++s) acc[s][t] = fma(d[s] * scale, integer_dot<kOffset>(w[s], a), acc[s][t]);
      if constexpr (format == EXPERTD_INT4) {
        const Rows total = rows_broadcast(static_cast<float>(a.correction));
        for (int s = 0; s < S; ++s) acc[s][t] = fma(m[s] * scale, total, acc[s][t]);
      }
    }
  }
  for (int s = 0; s < S; ++s) {
    for (int t = 0; t < T; ++t) rows_store(out + t * kUnitRows + s * kStripRows + part.first_row, acc[s][t]);
  }
}

// `tokens` <= T inputs, by as many as there are.
template <int format, int S, int T>
inline void integer_tile(const Unit& unit, const Part& part, const void* const* inputs, int tokens, float* out) {
  if (tokens == T) {
    integer_pass<format, S, T>(unit, part, inputs, out);
  } else if constexpr (T > 1) {
    integer_tile<format, S, T - 1>(unit, part, inputs, tokens, out);
  }
}

// S strips, block of groups after block, in each all tiles of tokens one after another.
template <int format, int S>
void integer_strips(const Unit& unit, const void* const* inputs, int tokens, float* out) {
  const int tiles = (tokens + kIntegerTile - 1) / kIntegerTile;
  const bool one_pass = tiles == 1 && kPassRows == kStripRows;
  const int64_t step = one_pass ? unit.groups : kBlockGroups;
  for (int64_t begin = 0; begin < unit.groups; begin += step) {
    const int64_t end = begin + step < unit.groups ? begin + step : unit.groups;
    for (int tile = 0, t = 0; tile < tiles; ++tile) {
      const int count = (tokens - t + tiles - tile - 1) / (tiles - tile);
      for (int row = 0; row < kStripRows; row += kPassRows) {
        const Part part{begin, end, row, row == 0 && tile == 0};
        integer_tile<format, S, kIntegerTile>(unit, part, inputs + t, count, out + t * kUnitRows);
      }
      t += count;
    }
  }
}

template <int format>
void integer_unit(const void* strips, const void* then, int64_t cols, int rows, const void* const* inputs, int tokens,
                  float* out) {
  Unit unit{static_cast<const uint8_t*>(strips), static_cast<const uint8_t*>(then), groups_of(cols),
            strip_bytes(format, cols)};
  if (rows > kStripRows && kPassStrips == kUnitStrips) {
    return integer_strips<format, kPassStrips>(unit, inputs, tokens, out);
  }
  for (int first = 0; first < rows; first += kStripRows, unit.strips += unit.bytes, unit.then += unit.bytes) {
    integer_strips<format, 1>(unit, inputs, tokens, out + first);
  }
}

constexpr Isa isa_of(const char* name, bool (*runs_here)()) {
  return {name,
          runs_here,
          {float_unit<float>, float_unit<uint16_t>, integer_unit<EXPERTD_INT8>, integer_unit<EXPERTD_INT4>,
           integer_unit<EXPERTD_INT4S>},
          quantise,
          turn_groups,
          activate};
}

}  // namespace
}  // namespace expertd
