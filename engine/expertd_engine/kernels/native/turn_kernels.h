// Groups of 16 rows, from the order in which GPUs read them to that of a strip. Include after a lanes_*.h, whose
// `turn` makes words [q][row] of a segment [row][q].
#pragma once

#include "expertd_kernels.h"
#include "formats.h"
#include "row_order.h"

namespace expertd {
namespace {

constexpr int kSegmentWords = 128;     // 8 of each row
constexpr int64_t kTurnAhead = 4096;   // bytes, asked of memory meanwhile

// `left`: bytes from the segment to the end of what is turned.
inline void turn_ahead(const uint8_t* segment, int64_t left, const uint8_t* then, uint32_t* words) {
  const uint8_t* const ahead = left > kTurnAhead ? segment + kTurnAhead : then + (kTurnAhead - left);
#pragma GCC unroll 1
  for (int64_t line = 0; line < kSegmentBytes; line += 64) prefetch(ahead + line);
  turn(segment, words);
}

// int8: values are kept from 1 on.
inline void turn_bytes(const uint8_t* data, int64_t groups, const uint8_t* then, uint8_t* out) {
  uint32_t words[kSegmentWords];
  for (int64_t group = 0; group < groups; ++group, data += kSegmentBytes, out += kSegmentBytes) {
    turn_ahead(data, (groups - group) * kSegmentBytes, then, words);
    for (uint32_t& word : words) word ^= 0x80808080u;
    __builtin_memcpy(out, words, sizeof words);
  }
}

// 4 bits, two groups a segment: the low halves are the first one's columns, the high ones the second's. Where `groups`
// is odd, the last segment's second group is not there.
inline void turn_nibbles(const uint8_t* data, int64_t groups, const uint8_t* then, uint8_t* out) {
  constexpr int kHalf = kSegmentWords / 2;
  constexpr uint32_t kLow = 0x0f0f0f0fu;
  uint32_t words[kSegmentWords], low[kHalf], high[kHalf];
  for (int64_t group = 0; group < groups; group += 2, data += kSegmentBytes, out += kSegmentBytes) {
    turn_ahead(data, (groups - group + 1) / 2 * kSegmentBytes, then, words);
    for (int i = 0; i < kHalf; ++i) {
      const uint32_t ahead = words[i], behind = words[i + kHalf];
      low[i] = (ahead & kLow) | (behind & kLow) << 4;
      high[i] = (ahead >> 4 & kLow) | (behind & ~kLow);
    }
    __builtin_memcpy(out, low, sizeof low);
    if (group + 1 < groups) __builtin_memcpy(out + sizeof low, high, sizeof high);
  }
}

void turn_groups(int format, const uint8_t* data, int64_t groups, const uint8_t* then, uint8_t* out) {
  return format == EXPERTD_INT8 ? turn_bytes(data, groups, then, out) : turn_nibbles(data, groups, then, out);
}

}  // namespace
}  // namespace expertd
