// Sixteen float32 lanes with one meaning on every instruction set: the same products, the same order of sums.
//
// Included by one translation unit per instruction set, which defines EXPERTD_LANES_{AVX512,AVX2,NEON} or none of them
// (portable) and has set the compiler's target. All is in an unnamed namespace: no unit may borrow another's code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(EXPERTD_LANES_AVX512) || defined(EXPERTD_LANES_AVX2)
#include <immintrin.h>
#elif defined(EXPERTD_LANES_NEON)
#include <arm_neon.h>
#endif

namespace expertd {
namespace {

constexpr int kLanes = 16;

// The upper half of a float32, as keys and values are stored.
struct Bf16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounded to the nearest, ties to even; a NaN stays one.
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, Bf16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = uint16_t(is_nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(EXPERTD_LANES_AVX512)

using Lanes = __m512;
// How many query rows and how many groups of sixteen keys (or dimensions) stay in registers at once.
constexpr int kRowsAtOnce = 6;
constexpr int kGroupsAtOnce = 4;

inline Lanes zero() { return _mm512_setzero_ps(); }
inline Lanes spread(float x) { return _mm512_set1_ps(x); }
inline Lanes load(const float* p) { return _mm512_loadu_ps(p); }
inline Lanes load(const Bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store(float* p, Lanes x) { _mm512_storeu_ps(p, x); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes sub(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
inline Lanes mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
inline Lanes div(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
inline Lanes max(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
inline Lanes min(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
// 2^n where x = 1.5 * 2^23 + n.
inline Lanes power_of_two(Lanes x) {
  const __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(x), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(0x3f800000)));
}
inline Lanes zero_where_less(Lanes value, Lanes x, float limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), value);
}

#elif defined(EXPERTD_LANES_AVX2)

struct Lanes {
  __m256 low, high;
};
constexpr int kRowsAtOnce = 3;
constexpr int kGroupsAtOnce = 2;

inline Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes spread(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 widen8(const Bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Lanes load(const Bf16* p) { return {widen8(p), widen8(p + 8)}; }
inline void store(float* p, Lanes x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Lanes sub(Lanes a, Lanes b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Lanes mul(Lanes a, Lanes b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Lanes div(Lanes a, Lanes b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline __m256 power_of_two8(__m256 x) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(x), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(0x3f800000)));
}
inline Lanes power_of_two(Lanes x) { return {power_of_two8(x.low), power_of_two8(x.high)}; }
inline __m256 keep8(__m256 value, __m256 x, float limit) {
  return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_NLT_UQ), value);
}
inline Lanes zero_where_less(Lanes value, Lanes x, float limit) {
  return {keep8(value.low, x.low, limit), keep8(value.high, x.high, limit)};
}

#elif defined(EXPERTD_LANES_NEON)

struct Lanes {
  float32x4_t part[4];
};
constexpr int kRowsAtOnce = 3;
constexpr int kGroupsAtOnce = 2;

template <class F>
inline Lanes each(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
inline Lanes zero() {
  return each([](int) { return vdupq_n_f32(0.0f); });
}
inline Lanes spread(float x) {
  return each([x](int) { return vdupq_n_f32(x); });
}
inline Lanes load(const float* p) {
  return each([p](int i) { return vld1q_f32(p + 4 * i); });
}
inline Lanes load(const Bf16* p) {
  return each([p](int i) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p) + 4 * i), 16));
  });
}
inline void store(float* p, Lanes x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.part[i]);
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return each([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); });
}
inline Lanes add(Lanes a, Lanes b) {
  return each([&](int i) { return vaddq_f32(a.part[i], b.part[i]); });
}
inline Lanes sub(Lanes a, Lanes b) {
  return each([&](int i) { return vsubq_f32(a.part[i], b.part[i]); });
}
inline Lanes mul(Lanes a, Lanes b) {
  return each([&](int i) { return vmulq_f32(a.part[i], b.part[i]); });
}
inline Lanes div(Lanes a, Lanes b) {
  return each([&](int i) { return vdivq_f32(a.part[i], b.part[i]); });
}
inline Lanes max(Lanes a, Lanes b) {
  return each([&](int i) { return vmaxq_f32(a.part[i], b.part[i]); });
}
inline Lanes min(Lanes a, Lanes b) {
  return each([&](int i) { return vminq_f32(a.part[i], b.part[i]); });
}
inline Lanes power_of_two(Lanes x) {
  return each([&](int i) {
    const uint32x4_t shifted = vshlq_n_u32(vreinterpretq_u32_f32(x.part[i]), 23);
    return vreinterpretq_f32_u32(vaddq_u32(shifted, vdupq_n_u32(0x3f800000u)));
  });
}
inline Lanes zero_where_less(Lanes value, Lanes x, float limit) {
  return each([&](int i) {
    const uint32x4_t less = vcltq_f32(x.part[i], vdupq_n_f32(limit));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value.part[i]), less));
  });
}

#else  // portable

struct Lanes {
  float at[kLanes];
};
constexpr int kRowsAtOnce = 1;
constexpr int kGroupsAtOnce = 4;

template <class F>
inline Lanes each(F f) {
  Lanes result;
  for (int i = 0; i < kLanes; ++i) result.at[i] = f(i);
  return result;
}
inline Lanes zero() {
  return each([](int) { return 0.0f; });
}
inline Lanes spread(float x) {
  return each([x](int) { return x; });
}
inline Lanes load(const float* p) {
  return each([p](int i) { return p[i]; });
}
inline Lanes load(const Bf16* p) {
  return each([p](int i) { return widen(p[i]); });
}
inline void store(float* p, Lanes x) { std::memcpy(p, x.at, sizeof x.at); }
// A library call per lane where the processor has no such instruction, for the sake of the same bits.
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return each([&](int i) { return std::fma(a.at[i], b.at[i], c.at[i]); });
}
inline Lanes add(Lanes a, Lanes b) {
  return each([&](int i) { return a.at[i] + b.at[i]; });
}
inline Lanes sub(Lanes a, Lanes b) {
  return each([&](int i) { return a.at[i] - b.at[i]; });
}
inline Lanes mul(Lanes a, Lanes b) {
  return each([&](int i) { return a.at[i] * b.at[i]; });
}
inline Lanes div(Lanes a, Lanes b) {
  return each([&](int i) { return a.at[i] / b.at[i]; });
}
inline Lanes max(Lanes a, Lanes b) {
  return each([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
}
inline Lanes min(Lanes a, Lanes b) {
  return each([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; });
}
inline Lanes power_of_two(Lanes x) {
  return each([&](int i) {
    uint32_t bits;
    std::memcpy(&bits, &x.at[i], sizeof bits);
    bits = (bits << 23) + 0x3f800000u;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  });
}
inline Lanes zero_where_less(Lanes value, Lanes x, float limit) {
  return each([&](int i) { return x.at[i] < limit ? 0.0f : value.at[i]; });
}

#endif

// The first `count` < 16 numbers at `p`, then zeros; nothing beyond them is read.
template <class T>
inline Lanes load_part(const T* p, int64_t count) {
  float padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = widen(p[i]);
  return load(padded);
}
template <class T>
inline Lanes load_up_to(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : load_part(p, count);
}
inline void store_up_to(float* p, Lanes x, int64_t count) {
  if (count >= kLanes) return store(p, x);
  float all[kLanes];
  store(all, x);
  std::memcpy(p, all, size_t(count) * sizeof(float));
}

// Sum of all lanes: halves added to halves.
inline float sum(Lanes x) {
  float at[kLanes];
  store(at, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) at[i] += at[i + width];
  return at[0];
}
inline float largest(Lanes x) {
  float at[kLanes];
  store(at, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) at[i] = at[i] > at[i + width] ? at[i] : at[i + width];
  return at[0];
}

// e^x to about 2 units in the last place; 0 below -87, clamped to e^88 above (Cephes' coefficients).
inline Lanes exponential(Lanes x) {
  const Lanes magic = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Lanes clamped = max(min(x, spread(88.0f)), spread(-87.0f));
  const Lanes shifted = fma(clamped, spread(1.44269504f), magic);
  const Lanes n = sub(shifted, magic);
  Lanes r = fma(n, spread(-0.693359375f), clamped);
  r = fma(n, spread(2.12194440e-4f), r);
  Lanes p = spread(1.9875691500e-4f);
  p = fma(p, r, spread(1.3981999507e-3f));
  p = fma(p, r, spread(8.3334519073e-3f));
  p = fma(p, r, spread(4.1665795894e-2f));
  p = fma(p, r, spread(1.6666665459e-1f));
  p = fma(p, r, spread(5.0000001201e-1f));
  p = add(fma(mul(p, r), r, r), spread(1.0f));
  return zero_where_less(mul(p, power_of_two(shifted)), x, -87.0f);
}

inline Lanes sigmoid(Lanes x) {
  const Lanes one = spread(1.0f);
  return div(one, add(one, exponential(sub(zero(), x))));
}

}  // namespace
}  // namespace expertd
