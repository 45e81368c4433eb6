// How matrices and quantised inputs lie in memory: sizes, offsets, and what dimensions are allowed.
#pragma once

#include <cstdint>
#include <string>

#include "errors.h"

namespace expertd {

constexpr int kStripRows = 16;     // rows of a strip: the unit of work, and of storage in the integer formats
constexpr int kGroupColumns = 32;  // columns that share a scale
constexpr int kMaxDimension = 1 << 28;

// 32 values of an input row, as the integer formats read them. An input row is a run of these, padded with zeros.
struct Group {
  float scale;
  int32_t correction;  // minus the format's zero point times sum(q); for INT4, which has minima, sum(q)
  int8_t q[kGroupColumns];
};
static_assert(sizeof(Group) == 40, "rows of 2^n groups should not fall into the same cache sets");

inline bool is_float_format(int format) { return format == EXPERTD_F32 || format == EXPERTD_BF16; }

inline void check_format(int format) {
  require(format >= EXPERTD_F32 && format <= EXPERTD_INT4S, "format is " + std::to_string(format) +
                                                                "; allowed are 0 (f32), 1 (bf16), 2 (int8), 3 (int4) "
                                                                "and 4 (int4s)");
}

inline void check_dimension(const char* name, int64_t value) {
  require(value >= 1 && value <= kMaxDimension,
          std::string(name) + " is " + std::to_string(value) + "; allowed are 1 to " + std::to_string(kMaxDimension));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t strips_of(int64_t rows) { return ceil_div(rows, kStripRows); }
inline int64_t groups_of(int64_t cols) { return ceil_div(cols, kGroupColumns); }

// What a stored q stands for zero, or what to multiply sum(q) with when there are minima.
inline int32_t correction_factor(int format) {
  return format == EXPERTD_INT8 ? -128 : format == EXPERTD_INT4S ? -8 : 1;
}

// Bytes from one strip of 16 rows to the next; the last strip of a float matrix may hold fewer rows.
inline int64_t strip_bytes(int format, int64_t cols) {
  if (format == EXPERTD_F32) return kStripRows * cols * 4;
  if (format == EXPERTD_BF16) return kStripRows * cols * 2;
  const int64_t data = format == EXPERTD_INT8 ? 512 : 256;
  const int64_t scales = format == EXPERTD_INT4 ? 64 : 32;
  return ceil_div(groups_of(cols) * (data + scales), 64) * 64;
}

inline int64_t matrix_bytes(int format, int64_t rows, int64_t cols) {
  if (format == EXPERTD_F32) return rows * cols * 4;
  if (format == EXPERTD_BF16) return rows * cols * 2;
  return strips_of(rows) * strip_bytes(format, cols);
}

// Bytes of one input row as the format's kernels read it.
inline int64_t input_bytes(int format, int64_t cols) {
  return is_float_format(format) ? cols * 4 : groups_of(cols) * static_cast<int64_t>(sizeof(Group));
}

}  // namespace expertd
