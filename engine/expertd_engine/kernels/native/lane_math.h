// Activation functions on Lanes. Include after a lanes_*.h; each translation unit compiles its own.
#pragma once

#include "expertd_kernels.h"
#include "isa.h"

namespace expertd {
namespace {

// Horner's rule; coefficients by rising power.
template <int n>
inline Lanes polynomial(const Lanes& x, const float (&c)[n]) {
  Lanes y = broadcast(c[n - 1]);
  for (int i = n - 2; i >= 0; --i) y = fma(y, x, broadcast(c[i]));
  return y;
}

// e^x; below -87 and above 88 as at these limits, so that 2^n stays a normal number. Relative error < 2e-7.
inline Lanes exponential(const Lanes& x) {
  // Chebyshev fit of e^r on |r| <= ln(2)/2: 2e-9.
  static constexpr float kFit[] = {1.0f, 1.00000004f, 0.500000005f, 0.166664053f, 0.0416663401f, 0.00837596823f,
                                   0.00139421598f};
  const Lanes within = at_least(at_most(x, 88.0f), -87.0f);
  const Lanes n = nearest(within * broadcast(1.44269504f));
  const Lanes high = fma(n, broadcast(-0.693359375f), within);  // ln(2) in two parts: this one is exact in 10 bits
  const Lanes r = fma(n, broadcast(2.12194440e-4f), high);
  return polynomial(r, kFit) * power_of_two(n);
}

// x / (1 + e^-kx) = x * sigmoid(kx)
inline Lanes times_sigmoid(const Lanes& x, const Lanes& kx) {
  return x / (broadcast(1.0f) + exponential(broadcast(0.0f) - kx));
}

// x times the normal distribution's integral up to x. erfc(z) = t * exp(-z^2 + P(t)), t = 1 / (1 + z/2): the form of
// Numerical Recipes' erfcc; P is our own Chebyshev fit over z in 0 .. 10, 5e-8. The relative error grows with z^2 only.
inline Lanes gelu(const Lanes& x) {
  static constexpr float kFit[] = {-1.26545493f,   0.99878246f,  0.385283634f, 0.0413959642f,  -0.0195080035f,
                                   -0.0398663176f, -0.746469895f, 1.19532768f,  -0.697536591f, 0.148046054f};
  const Lanes z = where_negative(x, broadcast(0.0f) - x, x) * broadcast(0.707106781f);
  const Lanes t = broadcast(1.0f) / fma(z, broadcast(0.5f), broadcast(1.0f));
  const Lanes tail = broadcast(0.5f) * t * exponential(fma(broadcast(0.0f) - z, z, polynomial(t, kFit)));
  return x * where_negative(x, tail, broadcast(1.0f) - tail);
}

inline Lanes gelu_tanh(const Lanes& x) {
  // x/2 (1 + tanh(y)) = x * sigmoid(2y), y = sqrt(2/pi) (x + 0.044715 x^3)
  const Lanes y2 = x * broadcast(1.59576912f) * fma(x * x, broadcast(0.044715f), broadcast(1.0f));
  return times_sigmoid(x, y2);
}

inline Lanes apply(int kind, const Lanes& x) {
  const Lanes positive = at_least(x, 0.0f);
  switch (kind) {
    case EXPERTD_SILU: return times_sigmoid(x, x);
    case EXPERTD_GELU: return gelu(x);
    case EXPERTD_GELU_TANH: return gelu_tanh(x);
    case EXPERTD_RELU: return positive;
    default: return positive * positive;  // EXPERTD_RELU2
  }
}

inline Lanes swiglu_clamped(const Activation& a, const Lanes& gate, const Lanes& up) {
  const Lanes g = at_most(gate, a.limit);
  const Lanes u = at_least(at_most(up, a.limit), -a.limit);
  return (u + broadcast(1.0f)) * times_sigmoid(g, g * broadcast(a.alpha));
}

inline Lanes activated(const Activation& a, bool gated, const Lanes& gate, const Lanes& up) {
  if (a.kind == EXPERTD_SWIGLU_CLAMPED) return swiglu_clamped(a, gate, up);
  return gated ? apply(a.kind, gate) * up : apply(a.kind, up);
}

void activate(const Activation& a, float* gate, float* up, int64_t n) {
  float* out = gate ? gate : up;
  for (int64_t i = 0; i < n; i += 16) {
    const int count = static_cast<int>(n - i < 16 ? n - i : 16);
    const Lanes u = count == 16 ? load(up + i) : load_first(up + i, count);
    const Lanes g = !gate ? u : count == 16 ? load(gate + i) : load_first(gate + i, count);
    const Lanes y = activated(a, gate != nullptr, g, u);
    if (count == 16) {
      store(out + i, y);
    } else {
      store_first(out + i, y, count);
    }
  }
}

}  // namespace
}  // namespace expertd
