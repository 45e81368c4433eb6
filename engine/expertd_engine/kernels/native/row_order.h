// Quantised matrices in the order in which GPUs read them: all data, then all scales, then all minima, each part a run
// of blocks of 16 rows (`kernels/row_order.py`). What a unit kernel reads is made of them a few strips at a time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace expertd {

constexpr int64_t kSegmentBytes = 512;  // 32 of each of 16 rows: a group of int8, or two of 4 bits
constexpr int64_t kCutColumns = 64;     // where a segment begins in every format

// Rows first .. first + `wanted` (at most kUnitRows; fewer at the end) of a `rows` x `cols` matrix in the order "rows",
// from column `first_col` on, as strips of so many columns at `out`, which has room for them. `first` is a multiple of
// kStripRows, `first_col` of kCutColumns, `format` one of the integers'.
// `then`: a matrix as large, whose same rows are probably asked for next, or null: those that follow are. Their
// beginning is fetched meanwhile.
void strips_of_rows(int format, const std::byte* matrix, int64_t rows, int64_t cols, int64_t first, int64_t wanted,
                    int64_t first_col, const std::byte* then, std::byte* out);

// The same rows of a plain matrix, from column `first_col` on, one after another.
void ends_of_rows(int format, const std::byte* matrix, int64_t rows, int64_t cols, int64_t first, int64_t first_col,
                  std::byte* out);

}  // namespace expertd
