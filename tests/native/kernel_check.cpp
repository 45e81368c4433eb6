// The kernels against plain sums in double precision, and against themselves: the same bits on every instruction set,
// with every number of threads, alone or in a batch. Stands alone, so that it can be built with sanitizers, for another
// processor, or from sources with a planted bug. Prints the first difference and ends with 1; or what it checked and a
// hash of all results, and ends with 0.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "expertd_kernels.h"
#include "pool.h"

namespace {

using check::expect, check::fail, check::random_floats, check::succeeds;

constexpr const char* kFormats[] = {"f32", "bf16", "int8", "int4", "int4s"};
constexpr double kTolerance = 1e-6;  // of the sum of magnitudes; measured: 3e-7

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(check::random_bits); }

// Bytes at a multiple of 64 and no more than fill the last 64: a sanitizer sees reads beyond them.
struct Bytes {
  explicit Bytes(size_t size) : data(static_cast<uint8_t*>(std::aligned_alloc(64, (size + 63) / 64 * 64))) {}
  ~Bytes() { std::free(data); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  uint8_t* const data;
};

// Any bytes are quantised weights (but int8's 0, which is not in its range); scales are small float16 of both signs.
void fill(int format, int64_t rows, int64_t cols, uint8_t* out) {
  const int64_t bytes = expertd_matrix_bytes(format, rows, cols);
  if (format == EXPERTD_F32) {
    for (int64_t i = 0; i < rows * cols; ++i) {
      const float value = uniform(-1, 1);
      std::memcpy(out + 4 * i, &value, 4);
    }
    return;
  }
  const int64_t strips = (rows + 15) / 16, groups = (cols + 31) / 32;
  const int64_t data = format == EXPERTD_BF16 ? 0 : groups * (format == EXPERTD_INT8 ? 512 : 256);
  const int64_t strip = format == EXPERTD_BF16 ? bytes : bytes / strips;
  for (int64_t at = 0; at < bytes; ++at) {
    const uint32_t bits = check::random_bits();
    const bool is_data = at % strip < data;
    const bool high_byte = at % 2 == 1;  // of a float16 or bfloat16: magnitudes between about 1/16 and 1
    const uint8_t exponent = format == EXPERTD_BF16 ? 0x3d + (bits >> 9) % 3 : 0x2c + (bits >> 9) % 16;
    out[at] = is_data ? std::max<uint8_t>(1, bits & 255) : high_byte ? exponent | (bits & 0x80) : bits & 255;
  }
}

// The input as the format's kernels see it.
std::vector<double> as_read(int format, const float* x, int64_t cols) {
  std::vector<double> seen(x, x + cols);
  if (format == EXPERTD_F32 || format == EXPERTD_BF16) return seen;
  for (int64_t k = 0; k < cols; k += 32) {
    float largest = 0;
    for (int64_t i = k; i < std::min(cols, k + 32); ++i) largest = std::max(largest, std::fabs(x[i]));
    const float scale = largest / 127.0f;
    for (int64_t i = k; i < std::min(cols, k + 32); ++i) seen[i] = scale ? std::nearbyint(x[i] / scale) * scale : 0;
  }
  return seen;
}

using Pool = std::unique_ptr<expertd_pool, int (*)(expertd_pool*)>;
Pool make_pool(int threads) {
  expertd_pool* pool = nullptr;
  succeeds(expertd_pool_create(threads, &pool));
  return Pool(pool, expertd_pool_destroy);
}

// Runs `compute` (pool -> floats) on every instruction set with 1 to 4 threads; all must give the bits of the first.
template <class Compute>
std::vector<float> same_everywhere(const std::string& what, Compute compute) {
  std::vector<float> first;
  for (const std::string& name : check::instruction_sets()) {
    succeeds(expertd_isa_use(name.c_str()));
    for (int threads = 1; threads <= 4; ++threads) {
      const Pool pool = make_pool(threads);
      const std::vector<float> result = compute(pool.get());
      if (first.empty()) first = result;
      expect(std::memcmp(first.data(), result.data(), 4 * first.size()) == 0,
             what + ": other bits with " + name + ", " + std::to_string(threads) + " threads");
    }
  }
  check::remember(first);
  return first;
}

void check_matmul(int format, int rows, int cols, int tokens) {
  const std::string what = std::string(kFormats[format]) + " [" + std::to_string(rows) + ", " + std::to_string(cols) +
                           "] x " + std::to_string(tokens);
  const Bytes data(expertd_matrix_bytes(format, rows, cols));
  fill(format, rows, cols, data.data);
  const std::vector<float> bias = random_floats(rows), x = random_floats(size_t(tokens) * cols);
  const expertd_matrix matrix{data.data, bias.data(), format, rows, cols};
  const auto product = [&](expertd_pool* pool, const float* from, int64_t count) {
    std::vector<float> y(count * rows);
    succeeds(expertd_matmul(pool, &matrix, from, count, cols, y.data(), rows));
    return y;
  };
  const auto y = same_everywhere(what, [&](expertd_pool* pool) { return product(pool, x.data(), tokens); });

  const Pool pool = make_pool(1);
  const auto last = product(pool.get(), x.data() + int64_t(tokens - 1) * cols, 1);
  const float* same = y.data() + int64_t(tokens - 1) * rows;
  expect(std::memcmp(last.data(), same, 4 * rows) == 0, what + ": a row alone differs");

  std::vector<float> weights(size_t(rows) * cols);
  std::vector<int64_t> ids(rows);
  for (int i = 0; i < rows; ++i) ids[i] = i;
  succeeds(expertd_rows(&matrix, ids.data(), rows, weights.data()));
  for (int t = 0; t < tokens; ++t) {
    const std::vector<double> seen = as_read(format, x.data() + int64_t(t) * cols, cols);
    for (int n = 0; n < rows; ++n) {
      double sum = bias[n], magnitude = std::fabs(bias[n]);
      for (int k = 0; k < cols; ++k) {
        const double term = double(weights[size_t(n) * cols + k]) * seen[k];
        sum += term;
        // With minima the format's sum has two terms, d q and m, which may nearly cancel in the weight.
        magnitude += format == EXPERTD_INT4 ? 20 * std::fabs(seen[k]) : std::fabs(term);
      }
      expect(std::fabs(y[size_t(t) * rows + n] - sum) <= kTolerance * magnitude, what + ": wrong sum");
    }
  }
}

void check_moe(int format, int hidden, int inner, int tokens) {
  const std::string what = std::string("moe ") + kFormats[format];
  constexpr int kExperts = 5;  // three or four a token: sums of two have no order
  const auto round_up = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  const int64_t up = round_up(expertd_matrix_bytes(format, inner, hidden)), down = 2 * up;
  const int64_t bias = down + round_up(expertd_matrix_bytes(format, hidden, inner));
  const Bytes memory(kExperts * round_up(bias + 4 * hidden));
  std::vector<const void*> records;
  for (int e = 0; e < kExperts; ++e) {
    uint8_t* record = memory.data + e * round_up(bias + 4 * hidden);
    fill(format, inner, hidden, record);
    fill(format, inner, hidden, record + up);
    fill(format, hidden, inner, record + down);
    const std::vector<float> values = random_floats(hidden);
    std::memcpy(record + bias, values.data(), 4 * hidden);
    records.push_back(record);
  }
  const expertd_expert_layout layout{hidden, inner, format, EXPERTD_SILU, 0, 0, 0, up, down, -1, -1, bias};
  std::vector<int32_t> begin{0}, row;
  std::vector<float> weight;
  for (int e = 0; e < kExperts; ++e) {
    for (int t = 0; t < tokens; ++t) {
      if ((t + e) % 3 == 0) continue;
      row.push_back(t);
      weight.push_back(uniform(0, 1));
    }
    begin.push_back(int32_t(row.size()));
  }
  const std::vector<float> x = random_floats(size_t(tokens) * hidden);
  const auto run = [&](expertd_pool* pool, float* out, float* partials) {
    succeeds(expertd_moe(pool, &layout, x.data(), tokens, kExperts, records.data(), begin.data(), row.data(),
                         weight.data(), out, partials));
  };
  const auto direct = same_everywhere(what, [&](expertd_pool* pool) {
    std::vector<float> out(x.size());
    run(pool, out.data(), nullptr);
    return out;
  });
  const auto in_parts = same_everywhere(what + " in parts", [&](expertd_pool* pool) {
    std::vector<float> partials(row.size() * hidden), out(x.size());
    run(pool, nullptr, partials.data());
    for (size_t pair = 0; pair < row.size(); ++pair) {
      for (int n = 0; n < hidden; ++n) out[size_t(row[pair]) * hidden + n] += partials[pair * hidden + n];
    }
    return out;
  });
  expect(direct == in_parts, what + ": partials and their sum differ from the direct form");
}

// Tasks are done once each, phase after phase, by as many threads as there are; a second call meanwhile is refused.
void check_pool() {
  for (int threads = 1; threads <= 4; ++threads) {
    const Pool handle = make_pool(threads);
    for (int round = 0; round < 50; ++round) {
      expertd::Call call(handle.get());
      std::vector<int> done(100), after(100);
      call.pool().parallel_for(100, [&](int64_t task) { ++done[task]; });
      call.pool().parallel_for(100, [&](int64_t task, int thread) {
        if (thread < 0 || thread >= threads) fail("a thread of another pool");
        after[task] = done[99 - task] + 1;
      });
      expect(done == std::vector<int>(100, 1) && after == std::vector<int>(100, 2), "a task not done once");
    }
    expertd::Call call(handle.get());
    const float x = 1;
    float y = 0;
    const expertd_matrix matrix{&x, nullptr, EXPERTD_F32, 1, 1};
    expect(expertd_matmul(handle.get(), &matrix, &x, 1, 1, &y, 1) == EXPERTD_BUSY, "a call inside a call");
    expect(expertd_pool_destroy(handle.get()) == EXPERTD_BUSY, "the end of a pool inside a call");
  }
}

}  // namespace

int main() {
  check_pool();
  const int shapes[][3] = {{1, 1, 1}, {16, 32, 8}, {17, 33, 3}, {40, 100, 13}, {96, 256, 9}};
  for (int format = EXPERTD_F32; format <= EXPERTD_INT4S; ++format) {
    for (const auto& shape : shapes) check_matmul(format, shape[0], shape[1], shape[2]);
    check_moe(format, 72, 40, 1);
    check_moe(format, 48, 96, 21);
  }
  return check::report();
}
