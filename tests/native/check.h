// What the programs beside it share: random input, expectations that end the program, and a hash of all results, by
// which runs on different processors are compared.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "expertd_kernels.h"

namespace check {

inline std::mt19937 random_bits(20261122);
inline int checks = 0;
inline uint64_t all_bits = 14695981039346656037u;  // FNV-1a

[[noreturn]] inline void fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

inline void expect(bool condition, const std::string& what) {
  ++checks;
  if (!condition) fail(what);
}

inline void succeeds(int code) {
  if (code != EXPERTD_OK) fail(std::string("an error: ") + expertd_error());
}

// Evenly distributed from `around - spread` to `around + spread`.
inline std::vector<float> random_floats(size_t n, float around = 0.0f, float spread = 1.0f) {
  std::vector<float> x(n);
  std::uniform_real_distribution<float> uniform(around - spread, around + spread);
  for (float& value : x) value = uniform(random_bits);
  return x;
}

inline std::vector<std::string> instruction_sets() {
  std::istringstream names(expertd_isa_available());
  std::vector<std::string> available;
  for (std::string name; names >> name;) available.push_back(name);
  return available;
}

// These are results, of which every processor has to give the same bits.
inline void remember(const std::vector<float>& results) {
  for (const float value : results) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    all_bits = (all_bits ^ bits) * 1099511628211u;
  }
}

// The last words of a program that found nothing.
inline int report() {
  std::printf("%d checks on %s\nbits %016llx\n", checks, expertd_isa_available(),
              static_cast<unsigned long long>(all_bits));
  return 0;
}

}  // namespace check
