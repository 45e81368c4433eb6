// lanes_portable.h in AVX-512 (F, BW, VL, DQ, VNNI).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "formats.h"

namespace expertd {
namespace {

struct Lanes {
  __m512 v;
};

constexpr int kDotRows = 4, kDotTokens = 4;

inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline Lanes widen(__m256i bf16) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16))}; }

inline Lanes broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline Lanes load_first(const float* from, int n) { return {_mm512_maskz_loadu_ps(first(n), from)}; }
inline Lanes load(const uint16_t* bf16) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16))); }
inline Lanes load_first(const uint16_t* bf16, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), bf16)); }
inline void store(float* to, Lanes x) { _mm512_storeu_ps(to, x.v); }
inline void store_first(float* to, Lanes x, int n) { _mm512_mask_storeu_ps(to, first(n), x.v); }

inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// min and max return their second operand if either is NaN.
inline Lanes at_most(Lanes x, float limit) { return {_mm512_min_ps(_mm512_set1_ps(limit), x.v)}; }
inline Lanes at_least(Lanes x, float limit) { return {_mm512_max_ps(_mm512_set1_ps(limit), x.v)}; }
inline Lanes nearest(Lanes x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Lanes power_of_two(Lanes n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
inline Lanes where_negative(Lanes x, Lanes a, Lanes b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LT_OQ), b.v, a.v)};
}
inline float sum(Lanes x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest_magnitude(Lanes a, Lanes b) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const __m512i both = _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(a.v), magnitude),
                                        _mm512_and_si512(_mm512_castps_si512(b.v), magnitude));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(_mm512_reduce_max_epu32(both)))));
}
inline int32_t store_bytes(int8_t* to, Lanes a, Lanes b) {
  const __m512i low = _mm512_cvtps_epi32(a.v), high = _mm512_cvtps_epi32(b.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(low));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), _mm512_cvtepi32_epi8(high));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(low, high));
}

// ---- strips of the integer formats: one vector is 16 rows x 4 columns, one vpdpbusd its product --------------------

using Rows = Lanes;
constexpr int kPassStrips = 2;
constexpr int kPassRows = 16;
constexpr int kIntegerTile = 4;
constexpr int64_t kPrefetchBytes = 4096;

inline Rows rows_zero() { return {_mm512_setzero_ps()}; }
inline Rows rows_load(const float* from) { return load(from); }
inline Rows rows_broadcast(float x) { return broadcast(x); }
inline Rows rows_load_half(const uint16_t* from) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}
inline void rows_store(float* to, Rows x) { store(to, x); }

struct Weights {
  __m512i q[8];
};

inline Weights unpack_bytes(const uint8_t* group, int /*first_row*/) {
  Weights w;
  for (int j = 0; j < 8; ++j) w.q[j] = _mm512_loadu_si512(group + 64 * j);
  return w;
}
inline Weights unpack_nibbles(const uint8_t* group, int /*first_row*/) {
  const __m512i nibble = _mm512_set1_epi8(15);
  Weights w;
  for (int j = 0; j < 4; ++j) {
    const __m512i both = _mm512_loadu_si512(group + 64 * j);
    w.q[j] = _mm512_and_si512(both, nibble);
    w.q[j + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
  }
  return w;
}

// Four columns of one input row, in every row's place.
inline __m512i quad(const int8_t* q) {
  int32_t four;
  __builtin_memcpy(&four, q, sizeof four);
  return _mm512_set1_epi32(four);
}

template <int kOffset>
inline Rows integer_dot(const Weights& w, const Group& x) {
  // Two chains: an instruction waits for the one before it in its chain.
  __m512i even = kOffset == 0 ? _mm512_setzero_si512() : _mm512_set1_epi32(x.correction);
  __m512i odd = _mm512_setzero_si512();
  for (int j = 0; j < 8; j += 2) {
    even = _mm512_dpbusd_epi32(even, w.q[j], quad(x.q + 4 * j));
    odd = _mm512_dpbusd_epi32(odd, w.q[j + 1], quad(x.q + 4 * j + 4));
  }
  return {_mm512_cvtepi32_ps(_mm512_add_epi32(even, odd))};
}

// Pairs of rows as quadruples of words, then quadruples of rows as runs of 16.
inline void turn(const uint8_t* segment, uint32_t* words) {
  const __m512i low = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
  for (int half = 0; half < 2; ++half) {
    __m512i quads[4];
    for (int i = 0; i < 4; ++i) {
      const __m512i first = _mm512_loadu_si512(segment + 128 * i), second = _mm512_loadu_si512(segment + 128 * i + 64);
      quads[i] = _mm512_permutex2var_epi32(first, half == 0 ? low : high, second);
    }
    const __m512i front01 = _mm512_shuffle_i32x4(quads[0], quads[1], 0x44);
    const __m512i back01 = _mm512_shuffle_i32x4(quads[0], quads[1], 0xee);
    const __m512i front23 = _mm512_shuffle_i32x4(quads[2], quads[3], 0x44);
    const __m512i back23 = _mm512_shuffle_i32x4(quads[2], quads[3], 0xee);
    uint32_t* const to = words + 64 * half;
    _mm512_storeu_si512(to, _mm512_shuffle_i32x4(front01, front23, 0x88));
    _mm512_storeu_si512(to + 16, _mm512_shuffle_i32x4(front01, front23, 0xdd));
    _mm512_storeu_si512(to + 32, _mm512_shuffle_i32x4(back01, back23, 0x88));
    _mm512_storeu_si512(to + 48, _mm512_shuffle_i32x4(back01, back23, 0xdd));
  }
}

__attribute__((always_inline)) inline void prefetch(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0);
}

__attribute__((always_inline)) inline void prefetch_once(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_NTA);
}

}  // namespace
}  // namespace expertd
