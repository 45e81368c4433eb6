// Matrix products as phases of a larger call: inputs are prepared once and read by several matrices, and one
// parallel_for runs the strips of all of them. expertd_matmul and the layer block are made of these.
#pragma once

#include "formats.h"
#include "pool.h"

namespace expertd {

// Input rows in the form that matrices of one format read: floats as they are, or rows of Group.
struct Inputs {
  const std::byte* rows;
  int64_t stride;  // bytes from row to row
  const void* row(int64_t i) const { return rows + i * stride; }
};

// y[t, :] = W x_t + bias for `rows` inputs; row t is written at y + t * ldy.
struct Product {
  const expertd_matrix* matrix;
  Inputs inputs;
  int64_t rows;
  float* y;
  int64_t ldy;
};

// Refused unless format, dimensions and data are usable; `name` stands in the text.
void check_matrix(const char* name, const expertd_matrix* matrix);

// One row of x [cols] as matrices of `format` read it, written to `out` (input_bytes(format, cols) long). For phases
// that fuse it with what produces x. A float format's row is copied.
void prepare_row(int format, const float* x, int64_t cols, void* out);

// The same for `rows` rows, as a phase of its own; memory comes from the pool's scratch. Nothing is copied, and x must
// stay, if the format reads floats.
Inputs prepare_inputs(Pool& pool, int format, const float* x, int64_t rows, int64_t cols, int64_t ldx);

// Runs all products as one phase. They may have different formats, shapes and inputs.
void run_products(Pool& pool, const Product* products, int count);

// Input rows to work through before going to the next strip, so that they stay in the second-level cache.
int64_t rows_per_block(int64_t stride);

}  // namespace expertd
