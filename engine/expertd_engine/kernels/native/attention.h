// Paged attention of one key head's queries over one sequence, in one form for prefill and decode.
#pragma once

#include <cstdint>

namespace expertd {

constexpr int kKeyTile = 64;  // keys per tile; tile borders are multiples of it from position 0, whatever the step

// Some consecutive positions of one sequence and the `group` query heads that share a key head: row r of `rows` is
// query head r % group at position `first + r / group`.
struct AttentionWork {
  const float* query;    // [rows][key_dim], already scaled
  const float* sinks;    // [group] scores of keys that have no value, or null
  const int32_t* table;  // the sequence's blocks
  const char* keys;      // of this layer and head in block 0, [key_dim][block_tokens]; values [block_tokens][value_dim]
  const char* values;
  int64_t block_stride;  // bytes from block to block
  int64_t first;         // position of row 0
  int64_t known;         // tokens that the sequence has stored
  int64_t window;        // how many last tokens a query sees, itself included; 0: all
  int32_t block_tokens;  // a multiple of 16
  int32_t rows, group, key_dim, value_dim;
  float* out;  // row r goes to out + (r / group) * out_stride + (r % group) * value_dim
  int64_t out_stride;
  float* scratch;  // attention_scratch(rows, value_dim) floats
};

inline int64_t padded_dim(int32_t dim) { return (int64_t(dim) + 15) / 16 * 16; }
inline int64_t attention_scratch(int64_t rows, int32_t value_dim) {
  return rows * (kKeyTile + padded_dim(value_dim) + 3);
}

}  // namespace expertd
