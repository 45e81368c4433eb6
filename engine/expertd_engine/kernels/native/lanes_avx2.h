// lanes_portable.h in AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "formats.h"

namespace expertd {
namespace {

struct Lanes {
  __m256 low, high;
};

constexpr int kDotRows = 2, kDotTokens = 2;

// Ones in the first n of 8 places.
inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256 widen(__m128i bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16)); }

inline Lanes broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Lanes load_first(const float* from, int n) {
  return {_mm256_maskload_ps(from, first(n)), _mm256_maskload_ps(from + 8, first(n - 8))};
}
inline Lanes load(const uint16_t* bf16) {
  const auto* from = reinterpret_cast<const __m128i*>(bf16);
  return {widen(_mm_loadu_si128(from)), widen(_mm_loadu_si128(from + 1))};
}
inline Lanes load_first(const uint16_t* bf16, int n) {
  alignas(32) uint16_t padded[16] = {};
  __builtin_memcpy(padded, bf16, sizeof(uint16_t) * static_cast<size_t>(n));
  return load(padded);
}
inline void store(float* to, Lanes x) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
inline void store_first(float* to, Lanes x, int n) {
  _mm256_maskstore_ps(to, first(n), x.low);
  _mm256_maskstore_ps(to + 8, first(n - 8), x.high);
}

inline Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
// min and max return their second operand if either is NaN.
inline Lanes at_most(Lanes x, float limit) {
  const __m256 most = _mm256_set1_ps(limit);
  return {_mm256_min_ps(most, x.low), _mm256_min_ps(most, x.high)};
}
inline Lanes at_least(Lanes x, float limit) {
  const __m256 least = _mm256_set1_ps(limit);
  return {_mm256_max_ps(least, x.low), _mm256_max_ps(least, x.high)};
}
inline Lanes nearest(Lanes x) {
  constexpr int kEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, kEven), _mm256_round_ps(x.high, kEven)};
}
inline __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Lanes power_of_two(Lanes n) { return {power_of_two(n.low), power_of_two(n.high)}; }
inline __m256 where_negative(__m256 x, __m256 a, __m256 b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ));
}
inline Lanes where_negative(Lanes x, Lanes a, Lanes b) {
  return {where_negative(x.low, a.low, b.low), where_negative(x.high, a.high, b.high)};
}
inline float sum(Lanes x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline __m256i larger_magnitude(Lanes x) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  return _mm256_max_epu32(_mm256_and_si256(_mm256_castps_si256(x.low), magnitude),
                          _mm256_and_si256(_mm256_castps_si256(x.high), magnitude));
}
inline float largest_magnitude(Lanes a, Lanes b) {
  const __m256i eight = _mm256_max_epu32(larger_magnitude(a), larger_magnitude(b));
  const __m128i four = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epu32(two, _mm_shuffle_epi32(two, 0xb1))));
}
inline int32_t store_bytes(int8_t* to, Lanes a, Lanes b) {
  const __m256i ints[4] = {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high), _mm256_cvtps_epi32(b.low),
                           _mm256_cvtps_epi32(b.high)};
  // The packs work on halves of 128 bits; the permutation puts fours back into their order.
  const __m256i bytes =
      _mm256_packs_epi16(_mm256_packs_epi32(ints[0], ints[1]), _mm256_packs_epi32(ints[2], ints[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(bytes, order));
  const __m256i eight = _mm256_add_epi32(_mm256_add_epi32(ints[0], ints[1]), _mm256_add_epi32(ints[2], ints[3]));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

// ---- strips of the integer formats: one vector is 8 rows x 4 columns ------------------------------------------------

struct Rows {
  __m256 v;
};
constexpr int kPassStrips = 1;
constexpr int kPassRows = 8;
constexpr int kIntegerTile = 4;
constexpr int64_t kPrefetchBytes = 4096;

inline Rows rows_zero() { return {_mm256_setzero_ps()}; }
inline Rows rows_load(const float* from) { return {_mm256_loadu_ps(from)}; }
inline Rows rows_broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Rows rows_load_half(const uint16_t* from) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
}
inline void rows_store(float* to, Rows x) { _mm256_storeu_ps(to, x.v); }
inline Rows operator*(Rows a, Rows b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Rows fma(Rows a, Rows b, Rows c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

struct Weights {
  __m256i q[8];
};

inline __m256i load_half_line(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline Weights unpack_bytes(const uint8_t* group, int first_row) {
  Weights w;
  for (int j = 0; j < 8; ++j) {  // signed, for the products below
    w.q[j] = _mm256_xor_si256(load_half_line(group + 64 * j + 4 * first_row), _mm256_set1_epi8(-128));
  }
  return w;
}
inline Weights unpack_nibbles(const uint8_t* group, int first_row) {
  const __m256i nibble = _mm256_set1_epi8(15);
  Weights w;
  for (int j = 0; j < 4; ++j) {
    const __m256i both = load_half_line(group + 64 * j + 4 * first_row);
    w.q[j] = _mm256_and_si256(both, nibble);
    w.q[j + 4] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
  }
  return w;
}

inline __m256i quad(const int8_t* q) {
  int32_t four;
  __builtin_memcpy(&four, q, sizeof four);
  return _mm256_set1_epi32(four);
}

// maddubs adds two products in 16 bits and saturates. q of 4 bits: eight such sums stay below 2 * 8 * 15 * 127 = 30480.
template <int kOffset>
inline Rows integer_dot(const Weights& w, const Group& x) {
  __m256i pairs = _mm256_maddubs_epi16(w.q[0], quad(x.q));
  for (int j = 1; j < 8; ++j) pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w.q[j], quad(x.q + 4 * j)));
  __m256i total = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  if constexpr (kOffset != 0) total = _mm256_add_epi32(total, _mm256_set1_epi32(x.correction));
  return {_mm256_cvtepi32_ps(total)};
}
// 8 bits: unsigned weights would saturate. |a| times the weight with a's sign: 2 * 127 * 127 = 32258 fits, and needs no
// correction.
template <>
inline Rows integer_dot<128>(const Weights& w, const Group& x) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i total = _mm256_setzero_si256();
  for (int j = 0; j < 8; ++j) {
    const __m256i a = quad(x.q + 4 * j);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(w.q[j], a));
    total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, ones));
  }
  return {_mm256_cvtepi32_ps(total)};
}

// Four words of each of four rows as four words of each of four columns.
inline void turn(const uint8_t* segment, uint32_t* words) {
  for (int row = 0; row < 16; row += 4) {
    for (int q = 0; q < 8; q += 4) {
      __m128i rows[4];
      for (int i = 0; i < 4; ++i) {
        rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(segment + (row + i) * 32 + q * 4));
      }
      const __m128i low01 = _mm_unpacklo_epi32(rows[0], rows[1]), low23 = _mm_unpacklo_epi32(rows[2], rows[3]);
      const __m128i high01 = _mm_unpackhi_epi32(rows[0], rows[1]), high23 = _mm_unpackhi_epi32(rows[2], rows[3]);
      const __m128i columns[4] = {_mm_unpacklo_epi64(low01, low23), _mm_unpackhi_epi64(low01, low23),
                                  _mm_unpacklo_epi64(high01, high23), _mm_unpackhi_epi64(high01, high23)};
      for (int i = 0; i < 4; ++i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(words + (q + i) * 16 + row), columns[i]);
      }
    }
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
