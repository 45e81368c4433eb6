// From blocks of rows to strips: 16 rows of 32 bytes become 8 runs of 16 words, and scales stay as they are.
#include "row_order.h"

#include <algorithm>
#include <cstring>

#include "formats.h"
#include "isa.h"

namespace expertd {
namespace {

constexpr int64_t kScales = 32;  // bytes of 16 rows' scales, or minima, of a group

int64_t padded(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// Inlined by force, as `fetch_ahead` of the strip kernels.
__attribute__((always_inline)) inline void fetch(const std::byte* from, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
}

}  // namespace

void strips_of_rows(int format, const std::byte* matrix, int64_t rows, int64_t cols, int64_t first, int64_t wanted,
                    int64_t first_col, const std::byte* then, std::byte* out) {
  const bool paired = format != EXPERTD_INT8;
  const int64_t all = groups_of(cols), stored = paired ? (all + 1) / 2 * 2 : all;
  const int64_t before = first_col / kGroupColumns, groups = all - before;
  const int64_t group_bytes = paired ? kSegmentBytes / 2 : kSegmentBytes;
  const int64_t row_data = stored * group_bytes / kStripRows, row_scales = stored * 2;
  const int64_t whole = strips_of(rows) * kStripRows;
  const std::byte* const scales = matrix + padded(whole * row_data) + before * kScales;
  const std::byte* const minima = scales + padded(whole * row_scales);
  const int64_t strips = std::min<int64_t>(strips_of(wanted), strips_of(rows - first));
  matrix += before * group_bytes;
  for (int64_t strip = 0; strip < strips; ++strip, out += strip_bytes(format, cols - first_col)) {
    const int64_t row = first + strip * kStripRows;
    fetch(scales + row * row_scales, groups * kScales);  // they lie elsewhere, and are copied at the end
    if (format == EXPERTD_INT4) fetch(minima + row * row_scales, groups * kScales);
    const bool follows = strip + 1 < strips || then == nullptr;
    const std::byte* const next = follows ? matrix + (row + kStripRows) * row_data : then + first * row_data;
    isa().turn(format, reinterpret_cast<const uint8_t*>(matrix + row * row_data), groups,
               reinterpret_cast<const uint8_t*>(next), reinterpret_cast<uint8_t*>(out));
    std::byte* const to = out + groups * group_bytes;
    std::memcpy(to, scales + row * row_scales, groups * kScales);
    if (format == EXPERTD_INT4) std::memcpy(to + groups * kScales, minima + row * row_scales, groups * kScales);
  }
}

void ends_of_rows(int format, const std::byte* matrix, int64_t rows, int64_t cols, int64_t first, int64_t first_col,
                  std::byte* out) {
  const int64_t item = format == EXPERTD_F32 ? 4 : 2, bytes = (cols - first_col) * item;
  const int64_t end = std::min<int64_t>(rows, first + kUnitRows);
  for (int64_t row = first; row < end; ++row, out += bytes) {
    const int64_t follows = std::min<int64_t>(row + kUnitRows, rows - 1);
    fetch(matrix + (follows * cols + first_col) * item, bytes);
    std::memcpy(out, matrix + (row * cols + first_col) * item, static_cast<size_t>(bytes));
  }
}

}  // namespace expertd
