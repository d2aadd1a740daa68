// The two sums of a sweep: of exponentials, and of the terms of the JSD.
//
// AVX-512 has tables of 32 floats in registers, which one instruction looks up: with them a term takes
// half of the multiplications that polynomials alone do.
#pragma once

#include "row.h"

namespace switchkd {
inline namespace SWITCHKD_CAPABILITY {

// What exponents are raised to: 2^-127 is 0, by its bits.
constexpr float LEAST_EXPONENT = -127.0f * LN2;

// e^x = scale s for LEAST_EXPONENT <= x <= 88, NaN for NaN; 0 at the least and up to 2^-126.
template <class V>
struct Product {
  V scale, s;
};

#if SWITCHKD_LANES == 16

// ------------------------------------------------------------------------------- tables

constexpr double power_series(double x) {  // e^x for -20 <= x <= 1
  double sum = 1.0, term = 1.0;
  for (int i = 1; i < 12; ++i) sum += term *= x / 64 / i;
  for (int i = 0; i < 6; ++i) sum *= sum;
  return sum;
}

constexpr double log_series(double x) {  // log x for 1 <= x <= 2
  const double y = (x - 1) / (x + 1);
  double sum = 0.0, term = y;
  for (int i = 1; i < 40; i += 2, term *= y * y) sum += term / i;
  return 2 * sum;
}

// 2^(j / 32), its bits less those that j itself has in `shifted` << 18.
struct Powers {
  alignas(64) uint32_t bits[32] = {};
  constexpr Powers() {
    for (int j = 0; j < 32; ++j) {
      const double mantissa = power_series(j * (0.6931471805599453 / 32)) - 1.0;
      bits[j] = 0x3F800000u + static_cast<uint32_t>(mantissa * 8388608.0 + 0.5) -
                (static_cast<uint32_t>(j) << 18);
    }
  }
};
constexpr Powers POWERS;

// (1 + e) (ln 2 - log1p(e)) - u e, e = e^-u, of rowwise.h: twice the term over max(p, q). From 20 on
// it is ln 2 but for 6e-8 of it. In 32 intervals, four to an octave of u + 5/64, each a polynomial in
// what u is above its start, through the values in Chebyshev's nodes: relative error 5e-7 at worst.
// The first is a multiple of u^2, and so exact to a digit as u vanishes.
constexpr float FACTOR_FROM = 0.078125f, FACTOR_TO = 19.92f;

constexpr double factor(double u) {
  const double e = power_series(-u);
  return (1 + e) * (0.6931471805599453 - log_series(1 + e)) - u * e;
}

struct Factors {
  alignas(64) float power[5][32] = {};
  constexpr Factors() {
    constexpr double OF_5[] = {-0.9510565162951535, -0.5877852522924731, 0.0, 0.5877852522924731,
                               0.9510565162951535};
    constexpr double OF_3[] = {-0.8660254037844387, 0.0, 0.8660254037844387};
    double start = FACTOR_FROM, octave = 0.0625;  // of which the second quarter starts there
    for (int i = 1; i <= 32; ++i) {
      const double width = octave / 4;
      const int lowest = i == 1 ? 2 : 0, count = 5 - lowest;
      double node[5] = {}, difference[5] = {}, found[5] = {};
      for (int k = 0; k < count; ++k) {
        node[k] = width / 2 * (1 + (i == 1 ? OF_3[k] : OF_5[k]));
        difference[k] = factor(start - FACTOR_FROM + node[k]);
        if (i == 1) difference[k] /= node[k] * node[k];
      }
      for (int order = 1; order < count; ++order)
        for (int k = count - 1; k >= order; --k)
          difference[k] = (difference[k] - difference[k - 1]) / (node[k] - node[k - order]);
      for (int k = count - 1; k >= 0; --k) {  // Newton's form, multiplied out
        for (int n = count - 1; n > 0; --n) found[n] = found[n - 1] - node[k] * found[n];
        found[0] = difference[k] - node[k] * found[0];
      }
      // Five bits of u + FACTOR_FROM, two of them its mantissa's: 13 for FACTOR_FROM itself.
      for (int n = 0; n < count; ++n)
        power[n + lowest][(i + 12) % 32] = static_cast<float>(found[n]);
      start += width;
      if (start >= 2 * octave) octave *= 2;
    }
  }
};
constexpr Factors FACTORS;

SWITCHKD_INLINE Vec lookup(const void* table, Bits index) {
  const float* from = static_cast<const float*>(table);
  return (Floats)_mm512_permutex2var_ps(
      _mm512_load_ps(from), (__m512i)index, _mm512_load_ps(from + 16));
}

// ------------------------------------------------------------------------------- terms

// x = n ln(2) / 32 + r, |r| <= ln(2) / 64, n by the addition of 1.5 2^23, which rounds; e^r by a
// parabola, to 6e-8 and at 0 exactly: a sum of ones is.
SWITCHKD_INLINE Product<Vec> exp_product(Vec x) {
  const Vec shifted = x * 46.16624130844683f + 12582912.0f, n = shifted - 12582912.0f;
  const Vec r = x - n * (LN2 / 32.0f);
  const Bits bits = (Bits)shifted.v;
  return {Vec((Floats)((Bits)lookup(POWERS.bits, bits).v + (bits << 18))),
          r * (r * 0.5f + 1.0000147f) + 1.0f};
}

SWITCHKD_INLINE Vec jsd_factor_by_table(Vec u) {
  const Vec from_zero = u + FACTOR_FROM;
  const Vec start = (Floats)((Bits)from_zero.v & 0xFFE00000u);
  const Vec above = u - (start - FACTOR_FROM);
  const Bits index = (Bits)from_zero.v >> 21;
  Vec f = above * lookup(FACTORS.power[4], index) + lookup(FACTORS.power[3], index);
  f = above * f + lookup(FACTORS.power[2], index);
  f = above * f + lookup(FACTORS.power[1], index);
  return above * f + lookup(FACTORS.power[0], index);
}

// Of bit patterns: of two negative numbers the larger, of the sizes of two the smaller, and of a NaN
// the other. Any of the processor's units does it, where two compare floats.
SWITCHKD_INLINE Vec least_bits(Vec a, Vec b) {
  return (Floats)_mm512_min_epu32((__m512i)a.v, (__m512i)b.v);
}

// What compares two rows. The JSD is symmetric: the first is the one of the smaller sum, by which p
// and q are multiplied, so that only the other has a logarithm to take off.
struct JsdRows {
  int first;
  float top[2], logs, difference, scale;
  bool far;  // the difference has lost what d is to have, as have the logits
  explicit JsdRows(const Scan models[2]) : first(models[1].total < models[0].total) {
    const Scan &one = models[first], &other = models[1 - first];
    top[0] = one.top;
    top[1] = other.top;
    logs = log(other.total / one.total);
    difference = (other.top - one.top) + logs;
    far = abs(difference) > 8.0f;
    scale = 0.5f / one.total;
  }
  // Adds the terms, over `scale`.
  template <bool FAR>
  SWITCHKD_INLINE Vec add(Vec one, Vec other, Vec sum) const {
    const Vec p = one - top[0], q = (other - top[1]) - logs;
    const Product<Vec> e = exp_product(least_bits(least_bits(p, q), Vec(LEAST_EXPONENT)));
    const Vec d = FAR ? q - p : (other - one) - difference;
    return e.scale * e.s * jsd_factor_by_table(least_bits(abs(d), Vec(FACTOR_TO))) + sum;
  }
};

#else

// ------------------------------------------------------------------------------- polynomials

SWITCHKD_INLINE Product<Vec> exp_product(Vec x) {
  const Mantissa<Vec> e = exp_mantissa(x);
  return {power_of_two(e.shifted), e.s};
}

// EXP_SCALE e^x, whose polynomial has a leading coefficient of 1: two instructions less.
constexpr float EXP_SCALE = 120.300498f;
SWITCHKD_INLINE Vec exp_scaled(Vec x) {
  const Vec shifted = x * 1.4426950408889634f + 12582912.0f, n = shifted - 12582912.0f;
  const Vec r = without(x, n);
  Vec s = r * (r + 5.03941236f) + 20.0506222f;
  s = r * s + 60.1493242f;
  s = r * s + EXP_SCALE;
  s = r * s + EXP_SCALE;
  return scaled(s, shifted);
}

struct JsdRows {
  static constexpr int first = 0;
  static constexpr bool far = false;
  Shift shift;
  float scale;
  explicit JsdRows(const Scan models[2]) : shift(shift_of(models)) {
    scale = 0.5f / (JSD_SCALE * EXP_SCALE) * shift.teacher_inverse;
  }
  template <bool>
  SWITCHKD_INLINE Vec add(Vec t, Vec s, Vec sum) const {
    return sum + exp_scaled(log_larger(t, s, shift)) * jsd_factor(log_ratio(t, s, shift));
  }
};

#endif

template <class V>
SWITCHKD_INLINE Product<Both<V>> exp_product(Both<V> x) {
  const Product<V> a = exp_product(x.a), b = exp_product(x.b);
  return {{a.scale, b.scale}, {a.s, b.s}};
}

// The terms are summed over 32 LANES columns at a time: the sum of more would be rounded too often.
template <bool FAR, class T>
SWITCHKD_INLINE void add_jsd(const JsdRows& rows, const T* one, const T* other, int count, Sum& total) {
  for (int run = 0; run < count; run += 32 * LANES) {
    Twin sum = Twin(0.0f);
    for (int i = run; i < count && i < run + 32 * LANES; i += 2 * LANES) {
      const Twin p = load_twin(one + i), q = load_twin(other + i);
      sum = {rows.add<FAR>(p.a, q.a, sum.a), rows.add<FAR>(p.b, q.b, sum.b)};
    }
    total.add(sum_of(sum) * rows.scale);
  }
}

template <class T>
SWITCHKD_INLINE void add_jsd(const JsdRows& rows, const T* teacher, const T* student, int count,
                             Sum& total) {
  const T *one = rows.first == 0 ? teacher : student, *other = rows.first == 0 ? student : teacher;
  rows.far ? add_jsd<true>(rows, one, other, count, total)
           : add_jsd<false>(rows, one, other, count, total);
}

}  // namespace SWITCHKD_CAPABILITY
}  // namespace switchkd
