// What each instruction set provides, and which one is in use. All give the same bits.
#pragma once

#include <cstdint>

namespace expertd {

constexpr int kTile = 8;        // input rows that one unit kernel call takes at most
constexpr int kUnitRows = 32;   // and rows of weights
constexpr int kUnitStrips = 2;  // which are so many strips: what is loaded of an input row serves all of them

// Multiplies `rows` <= kUnitRows rows of weights, from the beginning of a strip on, with `tokens` <= kTile input rows:
// out[t * kUnitRows + r] = sum_k W[r, k] * x_t[k]; all rows of a strip are written in the integer formats. Inputs are
// float rows, or rows of Group in the integer formats. `then` is the unit that will probably be read next, of as many
// columns: integer kernels fetch its beginning meanwhile.
using UnitKernel = void (*)(const void* strips, const void* then, int64_t cols, int rows, const void* const* inputs,
                            int tokens, float* out);

struct Activation {
  int kind;  // expertd_activation
  float alpha, limit;
};

struct Isa {
  const char* name;
  bool (*runs_here)();
  UnitKernel unit[5];  // by expertd_format
  // One row of `cols` floats as groups; `factor`: correction_factor of the format that will read it.
  void (*quantise)(const float* x, int64_t cols, int32_t factor, struct Group* out);
  // `groups` groups of 16 rows at `data`, in the order "rows", as those of a strip at `out`. Integer formats. `then`:
  // data that will probably be turned next.
  void (*turn)(int format, const uint8_t* data, int64_t groups, const uint8_t* then, uint8_t* out);
  // gate[i] = activation(gate[i], up[i]) for n values; gate null: up[i] = activation(up[i]).
  void (*activate)(const Activation& activation, float* gate, float* up, int64_t n);
};

const Isa& isa();  // in use; chosen at the first call

extern const Isa kPortable;
#if defined(__x86_64__)
extern const Isa kAvx2, kAvx512;
#elif defined(__aarch64__)
extern const Isa kNeon;
#endif

}  // namespace expertd
