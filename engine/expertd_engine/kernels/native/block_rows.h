// Norms, rotation, gates, routes: functions of one row, on Lanes. Include after a lanes_*.h.
#pragma once

#include <cmath>

#include "block_kernels.h"
#include "lane_math.h"

namespace expertd {
namespace {

inline Lanes load_up_to(const float* x, int64_t count) { return count >= 16 ? load(x) : load_first(x, int(count)); }

// Sum of f(lanes, sum so far) over a run: sixteen partial sums, added at the end. `f` sees zeros beyond the run's end.
template <class F>
float sum_of(const float* x, int64_t count, F f) {
  Lanes total = broadcast(0.0f);
  for (int64_t i = 0; i < count; i += 16) total = f(load_up_to(x + i, count - i), total);
  return sum(total);
}

// out[i] = f(x[i], i), sixteen at a time.
template <class F>
void map(const float* x, int64_t count, float* out, F f) {
  for (int64_t i = 0; i < count; i += 16) {
    const Lanes y = f(load_up_to(x + i, count - i), i);
    if (count - i >= 16)
      store(out + i, y);
    else
      store_first(out + i, y, int(count - i));
  }
}

void rms_norm(const expertd_norm& norm, const float* x, float* out) {
  const int64_t n = norm.length;
  const float squares = sum_of(x, n, [&](const Lanes& v, const Lanes& total) { return fma(v, v, total); });
  const Lanes scale = broadcast(1.0f / sqrtf(squares / float(n) + norm.eps));
  map(x, n, out, [&](const Lanes& v, int64_t i) { return load_up_to(norm.weight + i, n - i) * (v * scale); });
}

void layer_norm(const expertd_norm& norm, const float* x, float* out) {
  const int64_t n = norm.length, padding = (16 - n % 16) % 16;
  const float mean = sum_of(x, n, [&](const Lanes& v, const Lanes& total) { return v + total; }) / float(n);
  const float squares = sum_of(x, n, [&](const Lanes& v, const Lanes& total) {
    const Lanes centred = v - broadcast(mean);
    return fma(centred, centred, total);
  });
  const float variance = (squares - float(padding) * mean * mean) / float(n);  // each zero of padding added mean^2
  const Lanes scale = broadcast(1.0f / sqrtf(variance + norm.eps));
  map(x, n, out, [&](const Lanes& v, int64_t i) {
    const Lanes scaled = load_up_to(norm.weight + i, n - i) * ((v - broadcast(mean)) * scale);
    return norm.bias ? scaled + load_up_to(norm.bias + i, n - i) : scaled;
  });
}

void normalise(const expertd_norm& norm, const float* x, float* out) {
  if (norm.kind == EXPERTD_NORM_LAYER) return layer_norm(norm, x, out);
  rms_norm(norm, x, out);
}

void rotate(int32_t rope, int32_t rotary_dim, const float* cos, const float* sin, float* x) {
  const int32_t half = rotary_dim / 2;
  const int32_t step = rope == EXPERTD_ROPE_PAIRS ? 2 : 1, apart = rope == EXPERTD_ROPE_PAIRS ? 1 : half;
  for (int32_t i = 0; i < half; ++i) {
    const float a = x[i * step], b = x[i * step + apart];
    x[i * step] = a * cos[i] - b * sin[i];
    x[i * step + apart] = b * cos[i] + a * sin[i];
  }
}

void apply_gate(const float* gate, int64_t count, float* x) {
  map(x, count, x, [&](const Lanes& v, int64_t i) {
    return times_sigmoid(v, load_up_to(gate + i, count - i));
  });
}

// Highest first; of equals the lower id. Numbers that are no numbers come last.
void best_of(const float* logits, int32_t experts, int32_t top_k, float* left, int64_t* chosen) {
  constexpr float taken = -__builtin_huge_valf();
  for (int32_t e = 0; e < experts; ++e) left[e] = logits[e];
  for (int32_t k = 0; k < top_k; ++k) {
    int32_t best = -1;
    for (int32_t e = 0; e < experts; ++e)
      if (left[e] > (best < 0 ? taken : left[best])) best = e;
    if (best < 0) {  // only infinities and NaN are left: the lowest id not chosen yet
      for (best = 0;; ++best) {
        bool is_chosen = false;
        for (int32_t i = 0; i < k; ++i) is_chosen |= chosen[i] == best;
        if (!is_chosen) break;
      }
    }
    chosen[k] = best;
    left[best] = taken;
  }
}

void select_experts(int32_t selection, const float* logits, int32_t experts, int32_t top_k, float* scratch,
                    int64_t* chosen, float* weights) {
  best_of(logits, experts, top_k, scratch, chosen);
  const Lanes best = broadcast(logits[chosen[0]]);
  for (int32_t k = 0; k < top_k; ++k) weights[k] = logits[chosen[k]];
  map(weights, top_k, weights, [&](const Lanes& v, int64_t) { return exponential(v - best); });
  float total = 0.0f;
  if (selection == EXPERTD_SELECT_SOFTMAX) {
    map(logits, experts, scratch, [&](const Lanes& v, int64_t) { return exponential(v - best); });
    total = sum_of(scratch, experts, [&](const Lanes& v, const Lanes& sums) { return v + sums; });
  } else {
    for (int32_t k = 0; k < top_k; ++k) total += weights[k];
  }
  for (int32_t k = 0; k < top_k; ++k) weights[k] /= total;
}

inline void narrow(float x, float* to) { *to = x; }
// To the nearest bfloat16, ties to even; a NaN stays one.
inline void narrow(float x, uint16_t* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  *to = uint16_t((is_nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class T>
void write_strided(const float* from, int64_t count, int64_t stride, void* to) {
  T* const out = static_cast<T*>(to);
  for (int64_t i = 0; i < count; ++i) narrow(from[i], out + i * stride);
}

}  // namespace
}  // namespace expertd
