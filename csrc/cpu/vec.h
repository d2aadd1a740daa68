// A register of floats, with the functions that rowwise.h asks of its type.
//
// GCC's and Clang's vector extensions, which compile for any processor; intrinsics only where they
// would take several instructions for one. SWITCHKD_LANES: 16 needs AVX-512 F, BW, DQ and VL, 8 AVX2
// and FMA, 4 nothing.
#pragma once

#include <cstring>

#include "../noise.h"
#include "../rowwise.h"

#if SWITCHKD_LANES > 4
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace switchkd {
inline namespace SWITCHKD_CAPABILITY {

#ifndef SWITCHKD_INLINE  // under sanitizers `inline` alone: a tenth of the time to compile
#define SWITCHKD_INLINE inline __attribute__((always_inline))
#endif

constexpr int LANES = SWITCHKD_LANES;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint64_t Wide __attribute__((vector_size(4 * LANES)));  // half as many lanes

// 32-bit words in 64 bits each, as philox takes them.
struct WideWords {
  Wide v;
};
SWITCHKD_INLINE WideWords operator^(WideWords a, WideWords b) { return {a.v ^ b.v}; }
SWITCHKD_INLINE WideWords operator^(WideWords a, uint64_t b) { return {a.v ^ b}; }
SWITCHKD_INLINE WideWords operator>>(WideWords a, int b) { return {a.v >> b}; }

struct Vec {
  Floats v;
  SWITCHKD_INLINE Vec() {}
  SWITCHKD_INLINE Vec(Floats x) : v(x) {}
  SWITCHKD_INLINE Vec(float x) : v(x - Floats{}) {}  // -0 stays -0
};

SWITCHKD_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
SWITCHKD_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
SWITCHKD_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
SWITCHKD_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
SWITCHKD_INLINE Vec operator-(Vec a) { return -a.v; }
SWITCHKD_INLINE Vec abs(Vec a) { return (Floats)((Bits)a.v & 0x7FFFFFFFu); }

#if SWITCHKD_LANES == 16

typedef __mmask16 Mask;
SWITCHKD_INLINE Mask operator<(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
SWITCHKD_INLINE Mask operator==(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
SWITCHKD_INLINE Vec select(Mask where, Vec a, Vec b) {
  return (Floats)_mm512_mask_blend_ps(where, b.v, a.v);
}
SWITCHKD_INLINE unsigned lanes_of(Mask m) { return m; }
SWITCHKD_INLINE Vec min(Vec a, Vec b) { return (Floats)_mm512_min_ps(a.v, b.v); }
SWITCHKD_INLINE Vec max(Vec a, Vec b) { return (Floats)_mm512_max_ps(a.v, b.v); }
SWITCHKD_INLINE WideWords wide_product(WideWords a, uint32_t b) {
  return {(Wide)_mm512_mul_epu32((__m512i)a.v, _mm512_set1_epi64(b))};
}

#else

typedef Ints Mask;
SWITCHKD_INLINE Mask operator<(Vec a, Vec b) { return a.v < b.v; }
SWITCHKD_INLINE Mask operator==(Vec a, Vec b) { return a.v == b.v; }
SWITCHKD_INLINE Vec select(Mask where, Vec a, Vec b) { return where ? a.v : b.v; }

#if SWITCHKD_LANES == 8
SWITCHKD_INLINE unsigned lanes_of(Mask m) { return _mm256_movemask_ps((__m256)m); }
SWITCHKD_INLINE Vec min(Vec a, Vec b) { return (Floats)_mm256_min_ps(a.v, b.v); }
SWITCHKD_INLINE Vec max(Vec a, Vec b) { return (Floats)_mm256_max_ps(a.v, b.v); }
SWITCHKD_INLINE WideWords wide_product(WideWords a, uint32_t b) {
  return {(Wide)_mm256_mul_epu32((__m256i)a.v, _mm256_set1_epi64x(b))};
}
#elif defined(__SSE2__)
SWITCHKD_INLINE unsigned lanes_of(Mask m) { return _mm_movemask_ps((__m128)m); }
SWITCHKD_INLINE Vec min(Vec a, Vec b) { return (Floats)_mm_min_ps(a.v, b.v); }
SWITCHKD_INLINE Vec max(Vec a, Vec b) { return (Floats)_mm_max_ps(a.v, b.v); }
SWITCHKD_INLINE WideWords wide_product(WideWords a, uint32_t b) {
  return {(Wide)_mm_mul_epu32((__m128i)a.v, _mm_set1_epi64x(b))};
}
#else
SWITCHKD_INLINE unsigned lanes_of(Mask m) {
  return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8);
}
SWITCHKD_INLINE Vec min(Vec a, Vec b) { return a.v < b.v ? a.v : b.v; }
SWITCHKD_INLINE Vec max(Vec a, Vec b) { return a.v > b.v ? a.v : b.v; }
SWITCHKD_INLINE WideWords wide_product(WideWords a, uint32_t b) {
  return {(a.v & 0xFFFFFFFFu) * b};
}
#endif

#endif

SWITCHKD_INLINE Mask operator>(Vec a, Vec b) { return b < a; }

// ------------------------------------------------------------------------------- twins

// Registers that go through the same steps, so that none waits for its last result. Two do for short
// chains; a mixture of the losses needs four.
template <class M>
struct MaskOfBoth {
  M a, b;
};
template <class V>
struct Both {
  V a, b;
  typedef MaskOfBoth<decltype(V() < V())> M;
  SWITCHKD_INLINE Both() {}
  SWITCHKD_INLINE Both(V a, V b) : a(a), b(b) {}
  SWITCHKD_INLINE Both(float x) : a(x), b(x) {}
  friend SWITCHKD_INLINE Both operator+(Both x, Both y) { return {x.a + y.a, x.b + y.b}; }
  friend SWITCHKD_INLINE Both operator-(Both x, Both y) { return {x.a - y.a, x.b - y.b}; }
  friend SWITCHKD_INLINE Both operator*(Both x, Both y) { return {x.a * y.a, x.b * y.b}; }
  friend SWITCHKD_INLINE Both operator/(Both x, Both y) { return {x.a / y.a, x.b / y.b}; }
  friend SWITCHKD_INLINE Both operator-(Both x) { return {-x.a, -x.b}; }
  friend SWITCHKD_INLINE Both abs(Both x) { return {abs(x.a), abs(x.b)}; }
  friend SWITCHKD_INLINE Both min(Both x, Both y) { return {min(x.a, y.a), min(x.b, y.b)}; }
  friend SWITCHKD_INLINE Both max(Both x, Both y) { return {max(x.a, y.a), max(x.b, y.b)}; }
  friend SWITCHKD_INLINE M operator<(Both x, Both y) { return {x.a < y.a, x.b < y.b}; }
  friend SWITCHKD_INLINE M operator>(Both x, Both y) { return y < x; }
  friend SWITCHKD_INLINE M operator==(Both x, Both y) { return {x.a == y.a, x.b == y.b}; }
  friend SWITCHKD_INLINE Both select(M where, Both x, Both y) {
    return {select(where.a, x.a, y.a), select(where.b, x.b, y.b)};
  }
};
typedef Both<Vec> Twin;
typedef Both<Twin> Quad;

SWITCHKD_INLINE Vec sum_of(Twin x) { return x.a + x.b; }
SWITCHKD_INLINE Vec sum_of(Quad x) { return sum_of(x.a + x.b); }

// ------------------------------------------------------------------------------- memory

SWITCHKD_INLINE Vec load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

SWITCHKD_INLINE Twin load_twin(const float* from) { return {load(from), load(from + LANES)}; }
SWITCHKD_INLINE Quad load_quad(const float* from) {
  return {load_twin(from), load_twin(from + 2 * LANES)};
}

SWITCHKD_INLINE void store(float* to, Vec x) { std::memcpy(to, &x.v, sizeof x.v); }
SWITCHKD_INLINE void store(float* to, Twin x) {
  store(to, x.a);
  store(to + LANES, x.b);
}
SWITCHKD_INLINE void store(float* to, Quad x) {
  store(to, x.a);
  store(to + 2 * LANES, x.b);
}

SWITCHKD_INLINE Vec load_bfloat16(const uint16_t* from) {
  Halves half;
  std::memcpy(&half, from, sizeof half);
  return (Floats)(__builtin_convertvector(half, Bits) << 16);
}

inline float widened(float x) { return x; }
inline float widened(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }

// Those of even columns, then those of odd: an instruction for a register, where order costs two.
SWITCHKD_INLINE Twin load_twin(const uint16_t* from) {
  Bits pairs;
  std::memcpy(&pairs, from, sizeof pairs);
  return {Vec((Floats)(pairs << 16)), Vec((Floats)(pairs & 0xFFFF0000u))};
}

SWITCHKD_INLINE Bits nearest_bfloat16(Bits x) {  // to nearest even; no NaN is ever stored
  return (x + 0x7FFFu + ((x >> 16) & 1u)) >> 16;
}

SWITCHKD_INLINE void store_bfloat16(uint16_t* to, Vec x) {
  Halves half = __builtin_convertvector(nearest_bfloat16((Bits)x.v), Halves);
  std::memcpy(to, &half, sizeof half);
}

SWITCHKD_INLINE float sum(Vec x) {
  float lanes[LANES];
  store(lanes, x);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

SWITCHKD_INLINE float largest(Vec x) {
  float lanes[LANES];
  store(lanes, x);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = max(lanes[i], lanes[i + half]);
  return lanes[0];
}

// A sum that carries what rounding takes (Kahan 1965): many small equal terms beside a few large
// ones would otherwise all be rounded the same way.
struct Sum {
  Vec total = Vec(0.0f), lost = Vec(0.0f);
  SWITCHKD_INLINE void add(Vec x) {
    const Vec y = x - lost, next = total + y;
    lost = (next - total) - y;
    total = next;
  }
  SWITCHKD_INLINE void scale_by(float factor) {
    total = total * factor;
    lost = lost * factor;
  }
  SWITCHKD_INLINE float result() const {
    float totals[LANES], losses[LANES];
    store(totals, total);
    store(losses, lost);
    double all = 0.0;
    for (int i = 0; i < LANES; ++i) all += static_cast<double>(totals[i]) - losses[i];
    return static_cast<float>(all);
  }
  // Of terms none of which is NaN or -inf: an infinite one has left NaN.
  SWITCHKD_INLINE float positive() const {
    const float all = result();
    return all == all ? all : INFINITY;
  }
};

SWITCHKD_INLINE Vec to_float(Bits x) { return __builtin_convertvector((Ints)x, Floats); }

// ------------------------------------------------------------------------------- functions

// s 2^n, n in the low bits of `shifted`.
SWITCHKD_INLINE Vec scaled(Vec s, Vec shifted) {
  return (Floats)((Bits)s.v + ((Bits)shifted.v << 23));
}
template <class V>
SWITCHKD_INLINE Both<V> scaled(Both<V> s, Both<V> shifted) {
  return {scaled(s.a, shifted.a), scaled(s.b, shifted.b)};
}

SWITCHKD_INLINE Vec power_of_two(Vec shifted) {
  return (Floats)(((Bits)shifted.v << 23) + 0x3F800000u);
}

template <class V>
SWITCHKD_INLINE Both<V> power_of_two(Both<V> shifted) {
  return {power_of_two(shifted.a), power_of_two(shifted.b)};
}

SWITCHKD_INLINE Split<Vec> split(Vec w) {
  const Ints power = ((Ints)w.v - 0x3F3504F3) & -0x800000;
  return {to_float((Bits)power), Vec((Floats)((Ints)w.v - power)) - 1.0f};
}
template <class V>
SWITCHKD_INLINE Split<Both<V>> split(Both<V> w) {
  const Split<V> a = split(w.a), b = split(w.b);
  return {{a.power, b.power}, {a.f, b.f}};
}

// scale e^x = s 2^n to 2 ulp for -87 <= x <= 88 (4 ulp at the ends), n in the low bits of `shifted`.
// x = n ln 2 + r, |r| <= ln(2) / 2, n by the addition of 1.5 2^23, which rounds; e^r = 1 + r + r^2 P(r),
// P of degree 3 by minimax (1.05e-7 of e^r).
template <class F>
struct Mantissa {
  F s, shifted;
};
template <class F>
SWITCHKD_INLINE Mantissa<F> exp_mantissa(F x, float scale = 1.0f) {
  F shifted = x * 1.4426950408889634f + 12582912.0f, n = shifted - 12582912.0f;
  F r = without(x, n);
  F s = r * (8.3125175231e-3f * scale) + 4.1890203583e-2f * scale;
  s = r * s + 1.6667114821e-1f * scale;
  s = r * s + 4.9999231170e-1f * scale;
  s = r * s + scale;
  s = r * s + scale;
  return {s, shifted};
}
template <class F>
SWITCHKD_INLINE F exp_in_range(F x, float scale = 1.0f) {
  const Mantissa<F> e = exp_mantissa(x, scale);
  return scaled(e.s, e.shifted);
}

// e^x to 1.3 ulp for -87 <= x <= 88, 0 below (and for NaN). x = n ln 2 + r, |r| <= ln(2) / 2, n by
// the addition of 1.5 2^23, which rounds; e^r = 1 + r + r^2 P(r), P the interpolant of degree 4 in
// Chebyshev's nodes (1.0e-8).
SWITCHKD_INLINE Vec exp(Vec x) {
  Vec shifted = x * 1.4426950408889634f + 12582912.0f, n = shifted - 12582912.0f;
  Vec r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  Vec s = r * 1.3926250394e-3f + 8.3632329479e-3f;
  s = r * s + 4.1666552424e-2f;
  s = r * s + 1.6666576266e-1f;
  s = r * s + 0.5f;
  s = r * r * s + r + 1.0f;
  Vec scaled = (Floats)((Bits)s.v + ((Bits)shifted.v << 23));
  return select(x > Vec(-87.0f), scaled, Vec(0.0f));
}

}  // namespace SWITCHKD_CAPABILITY
}  // namespace switchkd
