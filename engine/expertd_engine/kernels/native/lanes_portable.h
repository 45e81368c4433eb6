// The vocabulary of every instruction set, in plain C++. lanes_avx2.h, lanes_avx512.h and lanes_neon.h say the same in
// intrinsics, operation by operation, so that one source of each kernel (lane_kernels.h) gives the same bits on all.
//
// Lanes: 16 floats. Rows: as many of a strip's 16 rows as one pass works on.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "formats.h"
#include "half.h"

namespace expertd {
namespace {

struct Lanes {
  float v[16];
};

// Register tile of the float kernels: rows x tokens.
constexpr int kDotRows = 2, kDotTokens = 2;

template <class Fn>
inline Lanes each(Fn fn) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.v[i] = fn(i);
  return out;
}

inline Lanes broadcast(float x) {
  return each([&](int) { return x; });
}
inline Lanes load(const float* from) {
  return each([&](int i) { return from[i]; });
}
// The first n < 16; zeros follow.
inline Lanes load_first(const float* from, int n) {
  return each([&](int i) { return i < n ? from[i] : 0.0f; });
}
inline Lanes load(const uint16_t* bf16) {
  return each([&](int i) { return bf16_to_float(bf16[i]); });
}
inline Lanes load_first(const uint16_t* bf16, int n) {
  return each([&](int i) { return i < n ? bf16_to_float(bf16[i]) : 0.0f; });
}
inline void store(float* to, const Lanes& x) { std::memcpy(to, x.v, sizeof x.v); }
inline void store_first(float* to, const Lanes& x, int n) {
  std::memcpy(to, x.v, sizeof(float) * static_cast<size_t>(n));
}

inline Lanes operator+(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Lanes operator-(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Lanes operator*(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Lanes operator/(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
// a * b + c, rounded once.
inline Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
  return each([&](int i) { return std::fmaf(a.v[i], b.v[i], c.v[i]); });
}
// x within limits; NaN stays NaN.
inline Lanes at_most(const Lanes& x, float limit) {
  return each([&](int i) { return limit < x.v[i] ? limit : x.v[i]; });
}
inline Lanes at_least(const Lanes& x, float limit) {
  return each([&](int i) { return limit > x.v[i] ? limit : x.v[i]; });
}
// To the nearest whole number, ties to even; |x| < 2^22.
inline Lanes nearest(const Lanes& x) {
  return each([&](int i) { return (x.v[i] + 0x1.8p23f) - 0x1.8p23f; });
}
// 2^n for whole n in -126 .. 127.
inline Lanes power_of_two(const Lanes& n) {
  return each([&](int i) { return float_of_bits(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23); });
}
// Lane by lane x < 0 ? a : b.
inline Lanes where_negative(const Lanes& x, const Lanes& a, const Lanes& b) {
  return each([&](int i) { return x.v[i] < 0 ? a.v[i] : b.v[i]; });
}
// Always in this order: halves on halves.
inline float sum(Lanes x) {
  for (int half = 8; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
  }
  return x.v[0];
}
// Largest magnitude of 32 values; NaN counts as larger than infinity.
inline float largest_magnitude(const Lanes& a, const Lanes& b) {
  uint32_t largest = 0;
  for (int i = 0; i < 32; ++i) {
    uint32_t bits;
    std::memcpy(&bits, i < 16 ? &a.v[i] : &b.v[i - 16], sizeof bits);
    bits &= 0x7fffffffu;
    if (bits > largest) largest = bits;
  }
  return float_of_bits(largest);
}
// Whole numbers in -127 .. 127 as bytes; returns their sum.
inline int32_t store_bytes(int8_t* to, const Lanes& a, const Lanes& b) {
  int32_t total = 0;
  for (int i = 0; i < 32; ++i) {
    to[i] = static_cast<int8_t>(i < 16 ? a.v[i] : b.v[i - 16]);
    total += to[i];
  }
  return total;
}

// ---- strips of the integer formats ----------------------------------------------------------------------------------

using Rows = Lanes;
constexpr int kPassStrips = 1;
constexpr int kPassRows = 16;
constexpr int kIntegerTile = 4;  // tokens per pass over the weights

inline Rows rows_zero() { return broadcast(0.0f); }
inline Rows rows_load(const float* from) { return load(from); }
inline Rows rows_broadcast(float x) { return broadcast(x); }
inline Rows rows_load_half(const uint16_t* from) {
  return each([&](int i) { return half_to_float(from[i]); });
}
inline void rows_store(float* to, const Rows& x) { store(to, x); }

// A group of a strip: 32 columns of kPassRows rows, unpacked.
struct Weights {
  uint8_t q[8][kPassRows][4];
};

inline Weights unpack_bytes(const uint8_t* group, int /*first_row*/) {
  Weights w;
  std::memcpy(w.q, group, sizeof w.q);
  return w;
}
inline Weights unpack_nibbles(const uint8_t* group, int /*first_row*/) {
  Weights w;
  uint8_t* low = &w.q[0][0][0];
  for (int i = 0; i < 256; ++i) {
    low[i] = group[i] & 15;
    low[i + 256] = group[i] >> 4;
  }
  return w;
}

// sum_k q[row, k] * a[k] + correction, exact (below 2^24), for kPassRows rows. kOffset tells instruction sets that want
// signed weights what a stored q stands for zero; the correction holds it already.
template <int kOffset>
inline Rows integer_dot(const Weights& w, const Group& x) {
  return each([&](int row) {
    int32_t total = x.correction;
    for (int k = 0; k < kGroupColumns; ++k) total += w.q[k / 4][row][k % 4] * x.q[k];
    return static_cast<float>(total);
  });
}
template <>
inline Rows integer_dot<0>(const Weights& w, const Group& x) {
  return each([&](int row) {
    int32_t total = 0;  // with minima: the correction is not of this sum
    for (int k = 0; k < kGroupColumns; ++k) total += w.q[k / 4][row][k % 4] * x.q[k];
    return static_cast<float>(total);
  });
}

constexpr int64_t kPrefetchBytes = 0;
inline void turn(const uint8_t* segment, uint32_t* words) {
  for (int row = 0; row < 16; ++row) {
    for (int q = 0; q < 8; ++q) std::memcpy(words + q * 16 + row, segment + row * 32 + q * 4, sizeof *words);
  }
}

inline void prefetch(const void* /*address*/) {}
inline void prefetch_once(const void* /*address*/) {}

}  // namespace
}  // namespace expertd
