// The phases that a decoder layer is made of: rows by rows, and products of rows that several matrices read.
#pragma once

#include <algorithm>

#include "linear.h"

namespace expertd {

constexpr int64_t kRowTask = 16384;  // numbers per task of a row-wise phase: some microseconds
constexpr int kMaxProducts = 4;

// Runs `row_of(row)` for all rows, several rows of `width` numbers to a task.
template <class F>
void for_rows(Pool& pool, int64_t rows, int64_t width, F row_of) {
  const int64_t share = std::max<int64_t>(1, kRowTask / std::max<int64_t>(1, width));
  pool.parallel_for((rows + share - 1) / share, [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * share);
    for (int64_t row = task * share; row < end; ++row) row_of(row);
  });
}

// Rows that several matrices read, brought into each format that is asked for once.
class Readers {
 public:
  Readers(Pool& pool, const float* x, int64_t rows, int64_t cols) : pool_(pool), x_(x), rows_(rows), cols_(cols) {}

  // Absent matrices are skipped.
  void add(const expertd_matrix& matrix, float* y) {
    if (matrix.data) products_[count_++] = {&matrix, inputs(matrix.format), rows_, y, matrix.rows};
  }
  void run() { run_products(pool_, products_, count_); }

 private:
  Inputs inputs(int32_t format) {
    if (!known_[format]) prepared_[format] = prepare_inputs(pool_, format, x_, rows_, cols_, cols_);
    known_[format] = true;
    return prepared_[format];
  }

  Pool& pool_;
  const float* x_;
  int64_t rows_, cols_;
  Inputs prepared_[EXPERTD_INT4S + 1];
  bool known_[EXPERTD_INT4S + 1] = {};
  Product products_[kMaxProducts];
  int count_ = 0;
};

inline void multiply(Pool& pool, const expertd_matrix& matrix, const float* x, int64_t rows, float* y) {
  Readers one(pool, x, rows, matrix.cols);
  one.add(matrix, y);
  one.run();
}

}  // namespace expertd
