// From blocks of rows to strips: 16 rows of 32 bytes become 8 runs of 16 words, and scales stay as they are.
#include "row_order.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "formats.h"
#include "isa.h"

namespace expertd {
namespace {

constexpr int kWords = 8;            // 32-bit words of a row's piece of a segment
constexpr int64_t kSegment = 512;    // bytes of 16 rows
constexpr int64_t kScales = 32;      // bytes of 16 rows' scales, or minima, of a group
constexpr int64_t kAhead = 4096;     // bytes, asked of memory meanwhile
constexpr uint32_t kLow = 0x0f0f0f0f;

int64_t padded(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

#if defined(__x86_64__)
// Four words of each of four rows as four words of each of four columns, by what every x86-64 has.
void turn_four(const uint32_t* rows, uint32_t* columns) {
  __m128i row[4];
  for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + i * kWords));
  const __m128i low01 = _mm_unpacklo_epi32(row[0], row[1]), low23 = _mm_unpacklo_epi32(row[2], row[3]);
  const __m128i high01 = _mm_unpackhi_epi32(row[0], row[1]), high23 = _mm_unpackhi_epi32(row[2], row[3]);
  const __m128i column[4] = {_mm_unpacklo_epi64(low01, low23), _mm_unpackhi_epi64(low01, low23),
                             _mm_unpacklo_epi64(high01, high23), _mm_unpackhi_epi64(high01, high23)};
  for (int q = 0; q < 4; ++q) _mm_storeu_si128(reinterpret_cast<__m128i*>(columns + q * kStripRows), column[q]);
}
#else
void turn_four(const uint32_t* rows, uint32_t* columns) {
  for (int q = 0; q < 4; ++q) {
    for (int i = 0; i < 4; ++i) columns[q * kStripRows + i] = rows[i * kWords + q];
  }
}
#endif

// Words [q][row] of a segment [row][q]. Parts of a matrix begin at multiples of 64 bytes.
void turn(const std::byte* segment, uint32_t* words) {
  for (int64_t line = 0; line < kSegment; line += 64) __builtin_prefetch(segment + kAhead + line);
  const auto* from = reinterpret_cast<const uint32_t*>(segment);
  for (int row = 0; row < kStripRows; row += 4) {
    for (int q = 0; q < kWords; q += 4) turn_four(from + row * kWords + q, words + q * kStripRows + row);
  }
}

// A group of int8: its values are kept from 1 on.
void bytes_of(const std::byte* segment, std::byte* out) {
  auto* word = reinterpret_cast<uint32_t*>(out);
  turn(segment, word);
  for (int i = 0; i < kWords * kStripRows; ++i) word[i] ^= 0x80808080u;
}

// Two groups of 4 bits: the low halves are the first one's columns, the high ones the second's. `second` may be null.
void nibbles_of(const std::byte* segment, std::byte* first, std::byte* second) {
  constexpr int kHalf = kWords / 2 * kStripRows;
  uint32_t word[2 * kHalf], low[kHalf], high[kHalf];
  turn(segment, word);
  for (int i = 0; i < kHalf; ++i) {
    const uint32_t ahead = word[i], behind = word[i + kHalf];
    low[i] = (ahead & kLow) | (behind & kLow) << 4;
    high[i] = (ahead >> 4 & kLow) | (behind & ~kLow);
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
