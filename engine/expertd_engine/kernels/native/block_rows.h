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

constexpr float kTaken = -__builtin_huge_valf();

// Index of the highest, of equals the lowest; -1 if none is above -infinity.
inline int32_t highest(const float* values, int32_t count) {
  int32_t best = -1;
  for (int32_t i = 0; i < count; ++i)
    if (values[i] > (best < 0 ? kTaken : values[best])) best = i;
  return best;
}

// Ids of the `count` highest of `values`, which are used up. Where only NaN and -infinity are left: the lowest ids.
void take_highest(float* values, int32_t length, int32_t count, int64_t* taken) {
  for (int32_t k = 0; k < count; ++k) {
    int32_t best = highest(values, length);
    for (bool is_free = best >= 0; !is_free;) {
      is_free = true;
      ++best;
      for (int32_t i = 0; i < k; ++i) is_free &= taken[i] != best;
    }
    taken[k] = best;
    values[best] = kTaken;
  }
}

// Makes the experts of all but the best groups ineligible. `worth` [groups].
void keep_groups(const expertd_router& router, float* eligible, float* worth) {
  const int32_t size = router.experts / router.groups;
  for (int32_t g = 0; g < router.groups; ++g) {
    float* const group = eligible + g * size;
    int32_t best[8];
    float saved[8];
    worth[g] = 0.0f;
    for (int32_t k = 0; k < router.group_best; ++k) {
      best[k] = highest(group, size);
      if (best[k] < 0) best[k] = 0;
      saved[k] = group[best[k]];
      worth[g] += saved[k];
      group[best[k]] = kTaken;
    }
    for (int32_t k = router.group_best; k-- > 0;) group[best[k]] = saved[k];
  }
  for (int32_t dropped = router.groups - router.groups_kept; dropped > 0; --dropped) {
    int32_t worst = -1;
    for (int32_t g = 0; g < router.groups; ++g)
      if (worth[g] != kTaken && (worst < 0 || worth[g] <= worth[worst])) worst = g;
    if (worst < 0) return;
    worth[worst] = kTaken;
    for (int32_t i = 0; i < size; ++i) eligible[worst * size + i] = kTaken;
  }
}

void score_experts(const expertd_router& router, const float* logits, float* scores) {
  const int32_t n = router.experts;
  const Lanes one = broadcast(1.0f);
  if (router.scores == EXPERTD_SCORES_SIGMOID) {
    map(logits, n, scores, [&](const Lanes& v, int64_t) { return times_sigmoid(one, v); });
  } else if (router.scores == EXPERTD_SCORES_CHOSEN) {
    for (int32_t e = 0; e < n; ++e) scores[e] = logits[e];
  } else {
    const int32_t best = highest(logits, n);
    const Lanes top = broadcast(best < 0 ? 0.0f : logits[best]);
    map(logits, n, scores, [&](const Lanes& v, int64_t) { return exponential(v - top); });
    const float total = sum_of(scores, n, [&](const Lanes& v, const Lanes& sums) { return v + sums; });
    for (int32_t e = 0; e < n; ++e) scores[e] /= total;
  }
}

// As keep_groups, for a choice among `allowed` experts alone. The lowest score stands for the others, so that a group
// with one allowed expert can still win; where the best groups have fewer than top_k allowed ones, all groups count.
void keep_allowed(const expertd_router& router, const uint8_t* allowed, float* eligible, float* worth) {
  const int32_t n = router.experts;
  if (router.groups > 1) {
    float* const grouped = worth + router.groups;
    float lowest = eligible[0];
    for (int32_t e = 1; e < n; ++e) lowest = eligible[e] < lowest ? eligible[e] : lowest;
    for (int32_t e = 0; e < n; ++e) grouped[e] = allowed[e] ? eligible[e] : lowest;
    keep_groups(router, grouped, worth);
    int32_t inside = 0;
    for (int32_t e = 0; e < n; ++e) inside += allowed[e] && grouped[e] != kTaken;
    for (int32_t e = 0; inside >= router.top_k && e < n; ++e) eligible[e] = grouped[e];
  }
  for (int32_t e = 0; e < n; ++e)
    if (!allowed[e]) eligible[e] = kTaken;
}

void select_experts(const expertd_router& router, const float* logits, const uint8_t* allowed, float* scratch,
                    int64_t* chosen, float* weights) {
  const int32_t n = router.experts, top_k = router.top_k;
  float *const scores = scratch, *const eligible = scores + n, *const worth = eligible + n;
  score_experts(router, logits, scores);
  for (int32_t e = 0; e < n; ++e) eligible[e] = router.bias ? scores[e] + router.bias[e] : scores[e];
  if (allowed)
    keep_allowed(router, allowed, eligible, worth);
  else if (router.groups > 1)
    keep_groups(router, eligible, worth);
  take_highest(eligible, n, top_k, chosen);
  for (int32_t k = 0; k < top_k; ++k) weights[k] = scores[chosen[k]];
  if (router.scores == EXPERTD_SCORES_CHOSEN) {
    const Lanes top = broadcast(weights[0]);
    map(weights, top_k, weights, [&](const Lanes& v, int64_t) { return exponential(v - top); });
  }
  float total = router.epsilon;
  for (int32_t k = 0; k < top_k; ++k) total += weights[k];
  const bool divides = router.shares || router.scores == EXPERTD_SCORES_CHOSEN;
  for (int32_t k = 0; k < top_k; ++k) weights[k] = (divides ? weights[k] / total : weights[k]) * router.scale;
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
