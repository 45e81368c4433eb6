// lanes_portable.h in NEON (ARMv8.2 with dot products).
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "formats.h"

namespace expertd {
namespace {

struct Lanes {
  float32x4_t v[4];
};

constexpr int kDotRows = 2, kDotTokens = 2;

template <class Fn>
inline Lanes each(Fn fn) {
  return {{fn(0), fn(1), fn(2), fn(3)}};
}
inline float32x4_t widen(uint16x4_t bf16) { return vreinterpretq_f32_u32(vshll_n_u16(bf16, 16)); }

inline Lanes broadcast(float x) {
  return each([&](int) { return vdupq_n_f32(x); });
}
inline Lanes load(const float* from) {
  return each([&](int i) { return vld1q_f32(from + 4 * i); });
}
inline Lanes load_first(const float* from, int n) {
  float padded[16] = {};
  __builtin_memcpy(padded, from, sizeof(float) * static_cast<size_t>(n));
  return load(padded);
}
inline Lanes load(const uint16_t* bf16) {
  return each([&](int i) { return widen(vld1_u16(bf16 + 4 * i)); });
}
inline Lanes load_first(const uint16_t* bf16, int n) {
  uint16_t padded[16] = {};
  __builtin_memcpy(padded, bf16, sizeof(uint16_t) * static_cast<size_t>(n));
  return load(padded);
}
inline void store(float* to, const Lanes& x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, x.v[i]);
}
inline void store_first(float* to, const Lanes& x, int n) {
  float all[16];
  store(all, x);
  __builtin_memcpy(to, all, sizeof(float) * static_cast<size_t>(n));
}

inline Lanes operator+(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline Lanes operator-(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline Lanes operator*(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline Lanes operator/(const Lanes& a, const Lanes& b) {
  return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
  return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
// min and max give NaN if either operand is.
inline Lanes at_most(const Lanes& x, float limit) {
  return each([&](int i) { return vminq_f32(x.v[i], vdupq_n_f32(limit)); });
}
inline Lanes at_least(const Lanes& x, float limit) {
  return each([&](int i) { return vmaxq_f32(x.v[i], vdupq_n_f32(limit)); });
}
inline Lanes nearest(const Lanes& x) {
  return each([&](int i) { return vrndnq_f32(x.v[i]); });
}
inline Lanes power_of_two(const Lanes& n) {
  return each([&](int i) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23));
  });
}
inline Lanes where_negative(const Lanes& x, const Lanes& a, const Lanes& b) {
  return each([&](int i) { return vbslq_f32(vcltzq_f32(x.v[i]), a.v[i], b.v[i]); });
}
inline float sum(const Lanes& x) {
  const float32x4_t four = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline uint32x4_t larger_magnitude(const Lanes& x) {
  const uint32x4_t magnitude = vdupq_n_u32(0x7fffffffu);
  uint32x4_t largest = vdupq_n_u32(0);
  for (int i = 0; i < 4; ++i) largest = vmaxq_u32(largest, vandq_u32(vreinterpretq_u32_f32(x.v[i]), magnitude));
  return largest;
}
inline float largest_magnitude(const Lanes& a, const Lanes& b) {
  return float_of_bits(vmaxvq_u32(vmaxq_u32(larger_magnitude(a), larger_magnitude(b))));
}
inline int16x8_t shorts(const Lanes& x, int half) {
  return vcombine_s16(vmovn_s32(vcvtnq_s32_f32(x.v[2 * half])), vmovn_s32(vcvtnq_s32_f32(x.v[2 * half + 1])));
}
inline int32_t store_bytes(int8_t* to, const Lanes& a, const Lanes& b) {
  const int8x16_t low = vcombine_s8(vmovn_s16(shorts(a, 0)), vmovn_s16(shorts(a, 1)));
  const int8x16_t high = vcombine_s8(vmovn_s16(shorts(b, 0)), vmovn_s16(shorts(b, 1)));
  vst1q_s8(to, low);
  vst1q_s8(to + 16, high);
  return vaddlvq_s8(low) + vaddlvq_s8(high);
}

// ---- strips of the integer formats: one vector is 4 rows x 4 columns, a pass 8 rows ---------------------------------

struct Rows {
  float32x4_t v[2];
};
constexpr int kPassStrips = 1;
constexpr int kPassRows = 8;
constexpr int kIntegerTile = 4;
constexpr int64_t kPrefetchBytes = 4096;

inline Rows rows_zero() { return {{vdupq_n_f32(0), vdupq_n_f32(0)}}; }
inline Rows rows_load(const float* from) { return {{vld1q_f32(from), vld1q_f32(from + 4)}}; }
inline Rows rows_broadcast(float x) { return {{vdupq_n_f32(x), vdupq_n_f32(x)}}; }
inline Rows rows_load_half(const uint16_t* from) {
  const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(from));
  return {{vcvt_f32_f16(vget_low_f16(halves)), vcvt_f32_f16(vget_high_f16(halves))}};
}
inline void rows_store(float* to, const Rows& x) {
  vst1q_f32(to, x.v[0]);
  vst1q_f32(to + 4, x.v[1]);
}
inline Rows operator*(const Rows& a, const Rows& b) { return {{vmulq_f32(a.v[0], b.v[0]), vmulq_f32(a.v[1], b.v[1])}}; }
inline Rows fma(const Rows& a, const Rows& b, const Rows& c) {
  return {{vfmaq_f32(c.v[0], a.v[0], b.v[0]), vfmaq_f32(c.v[1], a.v[1], b.v[1])}};
}

struct Weights {
  int8x16_t q[8][2];
};

inline Weights unpack_bytes(const uint8_t* group, int first_row) {
  Weights w;
  for (int j = 0; j < 8; ++j) {
    for (int half = 0; half < 2; ++half) {  // signed: sdot multiplies signed bytes
      const uint8x16_t stored = vld1q_u8(group + 64 * j + 4 * first_row + 16 * half);
      w.q[j][half] = vreinterpretq_s8_u8(veorq_u8(stored, vdupq_n_u8(128)));
    }
  }
  return w;
}
inline Weights unpack_nibbles(const uint8_t* group, int first_row) {
  Weights w;
  for (int j = 0; j < 4; ++j) {
    for (int half = 0; half < 2; ++half) {
      const uint8x16_t both = vld1q_u8(group + 64 * j + 4 * first_row + 16 * half);
      w.q[j][half] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
      w.q[j + 4][half] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
    }
  }
  return w;
}

template <int lane>
inline int32x4_t dot(int32x4_t acc, int8x16_t w, int8x16_t x) {
  return vdotq_laneq_s32(acc, w, x, lane);
}

// 8-bit weights are signed here and need no correction; 4-bit ones keep their zero point: the correction takes it off.
template <int kOffset>
inline Rows integer_dot(const Weights& w, const Group& x) {
  const int8x16_t low = vld1q_s8(x.q), high = vld1q_s8(x.q + 16);
  const int32x4_t begin = vdupq_n_s32(kOffset == 8 ? x.correction : 0);
  Rows out;
  for (int half = 0; half < 2; ++half) {
    int32x4_t acc = begin;
    acc = dot<0>(acc, w.q[0][half], low);
    acc = dot<1>(acc, w.q[1][half], low);
    acc = dot<2>(acc, w.q[2][half], low);
    acc = dot<3>(acc, w.q[3][half], low);
    acc = dot<0>(acc, w.q[4][half], high);
    acc = dot<1>(acc, w.q[5][half], high);
    acc = dot<2>(acc, w.q[6][half], high);
    acc = dot<3>(acc, w.q[7][half], high);
    out.v[half] = vcvtq_f32_s32(acc);
  }
  return out;
}

inline void turn(const uint8_t* segment, uint32_t* words) {
  for (int row = 0; row < 16; ++row) {
    for (int q = 0; q < 8; ++q) __builtin_memcpy(words + q * 16 + row, segment + row * 32 + q * 4, sizeof *words);
  }
}

__attribute__((always_inline)) inline void prefetch(const void* address) { __builtin_prefetch(address); }

__attribute__((always_inline)) inline void prefetch_once(const void* address) {
  __builtin_prefetch(address, 0, 0);
}

}  // namespace
}  // namespace expertd
