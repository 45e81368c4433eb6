// float16 and bfloat16 to float32, exactly.
#pragma once

#include <cstdint>
#include <cstring>

namespace expertd {
namespace {  // each translation unit its own: they are compiled for different processors

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float bf16_to_float(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
  // Exponent and fraction in float32's places, 112 powers of two too small: one exact product mends normal and
  // subnormal numbers alike.
  const float value = float_of_bits(magnitude << 13) * 0x1p112f;
  return sign ? -value : value;
}

}  // namespace
}  // namespace expertd
