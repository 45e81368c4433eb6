// From blocks of rows to strips: 16 rows of 32 bytes become 8 runs of 16 words, and scales stay as they are.
#include "row_order.h"

#include <algorithm>
#include <cstring>

#include "formats.h"
#include "isa.h"

namespace expertd {
namespace {

constexpr int kWords = 8;            // 32-bit words of a row's piece of a segment
constexpr int64_t kSegment = 512;    // bytes of 16 rows
constexpr int64_t kScales = 32;      // bytes of 16 rows' scales, or minima, of a group
constexpr uint32_t kLow = 0x0f0f0f0f;

int64_t padded(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// word[q][row] of a segment [row][q].
void turn(const std::byte* segment, uint32_t (*word)[kStripRows]) {
  uint32_t piece[kStripRows][kWords];
  std::memcpy(piece, segment, sizeof piece);
  for (int q = 0; q < kWords; ++q) {
    for (int row = 0; row < kStripRows; ++row) word[q][row] = piece[row][q];
  }
}

// A group of int8: its values are kept from 1 on.
void bytes_of(const std::byte* segment, std::byte* out) {
  uint32_t word[kWords][kStripRows];
  turn(segment, word);
  for (auto& run : word) {
    for (uint32_t& value : run) value ^= 0x80808080u;
  }
  std::memcpy(out, word, sizeof word);
}

// Two groups of 4 bits: the low halves are the first one's columns, the high ones the second's. `second` may be null.
void nibbles_of(const std::byte* segment, std::byte* first, std::byte* second) {
  uint32_t word[kWords][kStripRows], low[kWords / 2][kStripRows], high[kWords / 2][kStripRows];
  turn(segment, word);
  for (int q = 0; q < kWords / 2; ++q) {
    for (int row = 0; row < kStripRows; ++row) {
      const uint32_t ahead = word[q][row], behind = word[q + kWords / 2][row];
      low[q][row] = (ahead & kLow) | (behind & kLow) << 4;
      high[q][row] = (ahead >> 4 & kLow) | (behind & ~kLow);
    }
  }
  std::memcpy(first, low, sizeof low);
  if (second) std::memcpy(second, high, sizeof high);
}

}  // namespace

void strips_of_rows(int format, const std::byte* matrix, int64_t rows, int64_t cols, int64_t first, std::byte* out) {
  const bool paired = format != EXPERTD_INT8;
  const int64_t groups = groups_of(cols), stored = paired ? (groups + 1) / 2 * 2 : groups;
  const int64_t row_data = stored * (paired ? 16 : 32), row_scales = stored * 2;
  const int64_t whole = strips_of(rows) * kStripRows;
  const std::byte* const scales = matrix + padded(whole * row_data);
  const std::byte* const minima = scales + padded(whole * row_scales);
  const int64_t strips = std::min<int64_t>(kUnitStrips, strips_of(rows - first));
  for (int64_t strip = 0; strip < strips; ++strip, out += strip_bytes(format, cols)) {
    const int64_t row = first + strip * kStripRows;
    const std::byte* const data = matrix + row * row_data;
    std::byte* to = out;
    for (int64_t group = 0; group < groups; group += paired ? 2 : 1, to += kSegment) {
      if (!paired) {
        bytes_of(data + group * kSegment, to);
      } else {
        nibbles_of(data + group / 2 * kSegment, to, group + 1 < groups ? to + kSegment / 2 : nullptr);
      }
    }
    to = out + groups * (paired ? kSegment / 2 : kSegment);
    std::memcpy(to, scales + row * row_scales, groups * kScales);
    if (format == EXPERTD_INT4) std::memcpy(to + groups * kScales, minima + row * row_scales, groups * kScales);
  }
}

}  // namespace expertd
