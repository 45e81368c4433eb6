// How a product is split over tasks, and rows of a matrix read back.
#include "linear.h"

#include <algorithm>
#include <cstring>

#include "half.h"
#include "isa.h"

namespace expertd {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;  // a quarter to a half of a second-level cache
constexpr int64_t kTaskBytes = 64 << 10;    // weights of one task: a few microseconds of reading
constexpr int kMaxProducts = 64;

// The strips of one product, cut into tasks: chunks of strips x blocks of input rows.
struct Tasks {
  const Product* product;
  int64_t strips, chunk, chunks, block, end;  // end: number of tasks of this product and those before it
};

void run_strips(const Product& product, int64_t strip_begin, int64_t strip_end, int64_t row_begin, int64_t row_end) {
  const expertd_matrix& w = *product.matrix;
  const UnitKernel kernel = isa().unit[w.format];
  const int64_t bytes = strip_bytes(w.format, w.cols), end = std::min<int64_t>(w.rows, strip_end * kStripRows);
  float sums[kTile * kUnitRows];
  for (int64_t first = strip_begin * kStripRows; first < end; first += kUnitRows) {
    const int valid = static_cast<int>(std::min<int64_t>(kUnitRows, end - first));
    const auto* data = static_cast<const std::byte*>(w.data) + first / kStripRows * bytes;
    for (int64_t row = row_begin; row < row_end; row += kTile) {
      const int tokens = static_cast<int>(std::min<int64_t>(kTile, row_end - row));
      const void* inputs[kTile];
      for (int t = 0; t < tokens; ++t) inputs[t] = product.inputs.row(row + t);
      kernel(data, data + kUnitStrips * bytes, w.cols, valid, inputs, tokens, sums);
      for (int t = 0; t < tokens; ++t) {
        float* y = product.y + (row + t) * product.ldy + first;
        const float* sum = sums + t * kUnitRows;
        for (int r = 0; r < valid; ++r) y[r] = w.bias ? sum[r] + w.bias[first + r] : sum[r];
      }
    }
  }
}

float half_at(const uint8_t* address) {
  uint16_t bits;
  std::memcpy(&bits, address, sizeof bits);
  return half_to_float(bits);
}

// Row `row` of a strip of an integer format.
void read_strip_row(const expertd_matrix& w, const uint8_t* strip, int64_t row, float* out) {
  const int64_t groups = groups_of(w.cols);
  const bool bytes = w.format == EXPERTD_INT8;
  const uint8_t* scales = strip + groups * (bytes ? 512 : 256) + 2 * row;
  for (int64_t g = 0; g < groups; ++g, scales += 2 * kStripRows) {
    const uint8_t* data = strip + g * (bytes ? 512 : 256) + 4 * row;
    const float scale = half_at(scales);
    const float minimum = w.format == EXPERTD_INT4 ? half_at(scales + groups * 2 * kStripRows) : 0.0f;
    const int64_t count = std::min<int64_t>(kGroupColumns, w.cols - g * kGroupColumns);
    for (int64_t c = 0; c < count; ++c) {
      const uint8_t stored = data[(bytes ? c : c % 16) / 4 * 64 + c % 4];
      const int q = bytes ? stored - 128 : c < 16 ? stored & 15 : stored >> 4;
      out[g * kGroupColumns + c] = scale * static_cast<float>(w.format == EXPERTD_INT4S ? q - 8 : q) + minimum;
    }
  }
}

void read_row(const expertd_matrix& w, int64_t row, float* out) {
  if (w.format == EXPERTD_F32) {
    std::memcpy(out, static_cast<const float*>(w.data) + row * w.cols, sizeof(float) * static_cast<size_t>(w.cols));
  } else if (w.format == EXPERTD_BF16) {
    const auto* from = static_cast<const uint16_t*>(w.data) + row * w.cols;
    for (int64_t col = 0; col < w.cols; ++col) out[col] = bf16_to_float(from[col]);
  } else {
    const auto* data = static_cast<const uint8_t*>(w.data);
    read_strip_row(w, data + row / kStripRows * strip_bytes(w.format, w.cols), row % kStripRows, out);
  }
}

}  // namespace

void check_matrix(const char* name, const expertd_matrix* matrix) {
  const std::string text(name);
  require(matrix != nullptr, text + " is null");
  check_format(matrix->format);
  check_dimension((text + ".rows").c_str(), matrix->rows);
  check_dimension((text + ".cols").c_str(), matrix->cols);
  require(matrix->data != nullptr, text + ".data is null");
}

void prepare_row(int format, const float* x, int64_t cols, void* out) {
  if (is_float_format(format)) {
    std::memcpy(out, x, sizeof(float) * static_cast<size_t>(cols));
  } else {
    isa().quantise(x, cols, correction_factor(format), static_cast<Group*>(out));
  }
}

Inputs prepare_inputs(Pool& pool, int format, const float* x, int64_t rows, int64_t cols, int64_t ldx) {
  if (is_float_format(format)) {
    return {reinterpret_cast<const std::byte*>(x), ldx * static_cast<int64_t>(sizeof(float))};
  }
  const int64_t stride = input_bytes(format, cols);
  auto* memory = pool.scratch().get<std::byte>(rows * stride);
  const int64_t per_task = std::max<int64_t>(1, kTaskBytes / (cols * 4));  // a task is worth waking a thread for
  pool.parallel_for(ceil_div(rows, per_task), [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * per_task);
    for (int64_t row = task * per_task; row < end; ++row) {
      prepare_row(format, x + row * ldx, cols, memory + row * stride);
    }
  });
  return {memory, stride};
}

int64_t rows_per_block(int64_t stride) {
  return std::clamp<int64_t>(kBlockBytes / stride / kTile, 1, 16) * kTile;
}

void run_products(Pool& pool, const Product* products, int count) {
  require(count >= 0 && count <= kMaxProducts, "too many products in one phase");
  Tasks tasks[kMaxProducts];
  int64_t total = 0;
  for (int i = 0; i < count; ++i) {
    const Product& product = products[i];
    const int64_t strips = strips_of(product.matrix->rows);
    const int64_t bytes = strip_bytes(product.matrix->format, product.matrix->cols);
    const int64_t chunk = std::max<int64_t>(1, kTaskBytes / bytes / kUnitStrips) * kUnitStrips;
    const int64_t chunks = ceil_div(strips, chunk), block = rows_per_block(product.inputs.stride);
    total += chunks * ceil_div(product.rows, block);
    tasks[i] = {&product, strips, chunk, chunks, block, total};
  }
  pool.parallel_for(total, [&](int64_t task) {
    const Tasks* at = tasks;
    int64_t before = 0;
    while (task >= at->end) before = (at++)->end;
    const int64_t strip = (task - before) % at->chunks * at->chunk, row = (task - before) / at->chunks * at->block;
    run_strips(*at->product, strip, std::min(at->strips, strip + at->chunk), row,
               std::min(at->product->rows, row + at->block));
  });
}

}  // namespace expertd

using namespace expertd;

extern "C" int64_t expertd_matrix_bytes(int32_t format, int64_t rows, int64_t cols) {
  int64_t bytes = -1;
  guarded([&] {
    check_format(format);
    check_dimension("rows", rows);
    check_dimension("cols", cols);
    bytes = matrix_bytes(format, rows, cols);
  });
  return bytes;
}

extern "C" int expertd_matmul(expertd_pool* pool, const expertd_matrix* matrix, const float* x, int64_t rows,
                              int64_t ldx, float* y, int64_t ldy) {
  return guarded([&] {
    check_matrix("matrix", matrix);
    require(rows >= 0, "rows is " + std::to_string(rows) + "; allowed are 0 and more");
    require(ldx >= matrix->cols, "ldx is " + std::to_string(ldx) + ", less than the matrix' columns");
    require(ldy >= matrix->rows, "ldy is " + std::to_string(ldy) + ", less than the matrix' rows");
    require(rows == 0 || (x != nullptr && y != nullptr), "x or y is null");
    Call call(pool);
    const Inputs inputs = prepare_inputs(call.pool(), matrix->format, x, rows, matrix->cols, ldx);
    const Product product{matrix, inputs, rows, y, ldy};
    run_products(call.pool(), &product, 1);
  });
}

extern "C" int expertd_rows(const expertd_matrix* matrix, const int64_t* ids, int64_t n, float* out) {
  return guarded([&] {
    check_matrix("matrix", matrix);
    require(n >= 0, "n is " + std::to_string(n) + "; allowed are 0 and more");
    require(n == 0 || (ids != nullptr && out != nullptr), "ids or out is null");
    for (int64_t i = 0; i < n; ++i) {
      require(ids[i] >= 0 && ids[i] < matrix->rows,
              "ids[" + std::to_string(i) + "] is " + std::to_string(ids[i]) + "; the matrix has " +
                  std::to_string(matrix->rows) + " rows");
      read_row(*matrix, ids[i], out + i * matrix->cols);
    }
  });
}

extern "C" int expertd_pool_create(int32_t threads, expertd_pool** pool) {
  return guarded([&] {
    require(pool != nullptr, "pool is null");
    *pool = new expertd_pool{expertd::Pool(threads)};
  });
}

extern "C" int expertd_pool_destroy(expertd_pool* pool) {
  return guarded([&] {
    { Call call(pool); }  // refuses a null pool, and one that is inside a call
    delete pool;
  });
}

extern "C" int64_t expertd_pool_scratch_bytes(const expertd_pool* pool) {
  return pool == nullptr ? 0 : pool->pool.scratch().reserved();
}
