// The mathematics of a pair of rows, for the CPU (a vector of lanes at once) and for CUDA (a float).
//
// The C++ twin of rowwise.py, which defines it: p teacher, q student, d = log q - log p.
// F is float, or a type with its operators, with comparisons that return a mask, and with abs, min,
// max, select, exp_in_range, power_of_two and split. Nothing here needs a library but the C
// mathematics.
#pragma once

#include "scalar.h"

namespace switchkd {
inline namespace SWITCHKD_CAPABILITY {

// ------------------------------------------------------------------------------- functions

// x - n ln 2, of which little is left: in one rounding, or by two parts of ln 2, the first so short
// that its products are exact.
template <class F>
SWITCHKD_HOST_DEVICE F without(F x, F n) {
#if defined(__FMA__) || defined(__aarch64__) || defined(__CUDA_ARCH__)
  return x - n * LN2;
#else
  return (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
#endif
}

// 2^n, n in the low bits of `shifted`.
SWITCHKD_HOST_DEVICE float power_of_two(float shifted) {
  return as_float((as_bits(shifted) << 23) + 0x3F800000u);
}

// w = 2^n (1 + f), 1 + f in [1/sqrt 2, sqrt 2), for normal w > 0; n times 2^23.
template <class F>
struct Split {
  F power, f;
};
SWITCHKD_HOST_DEVICE Split<float> split(float w) {
  const uint32_t power = (as_bits(w) - 0x3F3504F3u) & 0xFF800000u;
  return {static_cast<float>(static_cast<int32_t>(power)), as_float(as_bits(w) - power) - 1.0f};
}

// e^x = scale (1 + r + bend) for -87 <= x <= 0: x = n ln 2 + r, |r| <= ln(2) / 2, scale = 2^n, n by
// the addition of 1.5 2^23, which rounds. bend = r^2 P(r), P of degree 4 by minimax (1.3e-7 of itself,
// 1e-8 of e^x).
template <class F>
struct Power {
  F scale, r, bend;
};

template <class F>
SWITCHKD_HOST_DEVICE Power<F> power(F x) {
  F shifted = x * 1.4426950408889634f + 12582912.0f, n = shifted - 12582912.0f;
  F r = without(x, n);
  F s = r * 1.3901304919e-3f + 8.3631705493e-3f;
  s = r * s + 4.1666854173e-2f;
  s = r * s + 1.6666577756e-1f;
  s = r * s + 0.5f;
  return {power_of_two(shifted), r, r * r * s};
}

// log(1 + f) - f for 1/sqrt 2 <= 1 + f < sqrt 2: by minimax, within 3e-7 of itself.
template <class F>
SWITCHKD_HOST_DEVICE F log_bend(F f) {
  F b = f * 0.0890195295214653f - 0.14212730526924133f;
  b = f * b + 0.14820295572280884f;
  b = f * b - 0.1658124178647995f;
  b = f * b + 0.19972553849220276f;
  b = f * b - 0.25001394748687744f;
  b = f * b + 0.33333665132522583f;
  b = f * b - 0.4999999701976776f;
  return f * f * b;
}

// cap tanh(z / cap)
template <class F>
SWITCHKD_HOST_DEVICE F soft_cap(F z, float cap) {
  Power<F> e = power(-min(abs(z / F(cap)) * 2.0f, F(87.0f)));
  F a = (F(1.0f) - e.scale) - e.scale * (e.r + e.bend);  // 1 - e^(-2 |z / cap|)
  return select(z < F(0.0f), -a, a) / (F(2.0f) - a) * cap;
}

// Maximum and sum of e^(z - maximum) of a row: NaN for a row with a NaN or +inf, 0 for one of -inf.
struct Softmax {
  float top, total;
};

SWITCHKD_HOST_DEVICE bool is_distribution(float total) {
  return total > 0.0f && total < INFINITY;
}

// What compares two rows, entry by entry. d's error from the sums is one rounding, the same for a
// whole row, and enters a divergence only squared.
struct Shift {
  float teacher_top, student_top, tops, logs, teacher_inverse, student_inverse;
};

SWITCHKD_HOST_DEVICE Shift shift_of(Softmax teacher, Softmax student) {
  return {teacher.top, student.top, student.top - teacher.top, log(student.total / teacher.total),
          1.0f / teacher.total, 1.0f / student.total};
}

template <class F>
SWITCHKD_HOST_DEVICE F log_ratio(F teacher, F student, const Shift& by) {
  return ((student - teacher) - by.tops) - by.logs;  // NaN for -inf in both rows
}

// Logarithm of max(p, q) times the teacher's sum; -inf in both rows counts as -87.
template <class F>
SWITCHKD_HOST_DEVICE F log_larger(F teacher, F student, const Shift& by) {
  F below = min(by.teacher_top - teacher, (by.student_top - student) + by.logs);
  return -min(below, F(87.0f));
}

template <class F>
SWITCHKD_HOST_DEVICE F larger(F teacher, F student, const Shift& by) {
  return exp_in_range(log_larger(teacher, student, by));
}

// p and q by the larger of them, which all terms are multiples of, and by their ratio.
template <class F>
struct Entry {
  F larger;               // max(p, q), at least e^-87 over a sum
  F distance, u;          // |d|, 0 where both vanish, and that up to 87
  F ratio, drop, bend;    // e^-u, the smaller over the larger; ratio - 1; drop + u: all exactly
  decltype(F() < F()) teacher;  // whether p is the larger
};

// The larger by its own row alone: a q of 1 is then 1, as the gradient of a certain row asks.
template <class F>
SWITCHKD_HOST_DEVICE Entry<F> compare(F teacher, F student, const Shift& by) {
  Entry<F> x;
  F d = log_ratio(teacher, student, by);
  x.teacher = d < F(0.0f);
  F below = select(x.teacher, by.teacher_top - teacher, by.student_top - student);
  Power<F> top = power(-min(below, F(87.0f)));
  F inverse = select(x.teacher, F(by.teacher_inverse), F(by.student_inverse));
  x.larger = (top.scale * (top.r + top.bend) + top.scale) * inverse;
  x.distance = max(abs(d), F(0.0f));  // of a NaN the other
  x.u = min(x.distance, F(87.0f));
  Power<F> e = power(-x.u);
  F h = e.r + e.bend, rest = e.scale - 1.0f;
  x.ratio = e.scale * h + e.scale;
  x.drop = e.scale * h + rest;
  x.bend = e.scale * e.bend + ((e.scale * e.r + x.u) + rest);  // where n = 0: e.bend
  return x;
}

// ------------------------------------------------------------------------------- divergences

// m h(tanh(d / 2)), m = (p + q) / 2, h(tanh s) = s tanh s - log cosh s, with x = max(p, q) and
// e = e^-u, u = |d|, so that m = x (1 + e) / 2. Near 0 h is d^2 by a polynomial in d^2, else the same
// terms gathered, (1 + e) (ln 2 - log1p(e)) - u e, lose less than a digit, and the first of them is a
// polynomial in e <= e^-1. Both by minimax, of relative error 2.8e-8 and 5.7e-8. e comes, and the
// result goes, JSD_SCALE times as large, so that a coefficient of 1 spares a product.
constexpr float JSD_SCALE = 0.39770302f;
template <class F>
SWITCHKD_HOST_DEVICE F jsd_factor(F u, F e) {  // of x / 2
  F u2 = u * u;
  F near = u2 * 1.5079555731e-5f - 1.8115312355e-4f;
  near = u2 * near + 1.7350388489e-3f;
  near = u2 * near - 1.5624890518e-2f;
  near = u2 * near + 0.125f;
  near = u2 * near;
  F far = e * (e - 1.1753255129f) + 1.0423403978f;
  far = e * far - 1.2568025590f;
  far = e * far - 3.0685874820e-1f;
  far = e * far + 2.7566674352e-1f;
  return select(u < F(1.0f), near * (e + JSD_SCALE), far - u * e);
}

// A d of NaN adds nothing: it is 0 on a CPU, and 87 under CUDA, where larger() is e^-87.
template <class F>
SWITCHKD_HOST_DEVICE F jsd_factor(F d) {
  F u = max(min(F(87.0f), abs(d)), F(0.0f));
  return jsd_factor(u, exp_in_range(-u, JSD_SCALE));
}

// Where the teacher's is the larger of the two, the first.
template <class F>
SWITCHKD_HOST_DEVICE F by_larger(const Entry<F>& x, F teacher, F student) {
  return select(x.teacher, teacher, student);
}

// KL of the larger to the smaller and back, in terms y - x - x (log y - log x) >= 0: u - (1 - e),
// and 1 - e - u e without its cancellation. Infinite where the smaller is 0.
template <class F>
SWITCHKD_HOST_DEVICE F kl_from_larger(const Entry<F>& x) {
  return x.bend + (x.distance - x.u);
}
template <class F>
SWITCHKD_HOST_DEVICE F kl_from_smaller(const Entry<F>& x) {
  return x.drop * x.drop - x.ratio * x.bend;
}
template <class F>
SWITCHKD_HOST_DEVICE F kl_teacher_student(const Entry<F>& x) {
  return by_larger(x, kl_from_larger(x), kl_from_smaller(x));
}

// m = a p + b q, a + b = 1, by m / max(p, q) = 1 + drop, and log(1 + drop) - drop.
template <class F>
struct Mixture {
  float a, b;
  F share, bend;
};

// Where 1 + drop is near 1, what rounding took from it does not enter its logarithm.
template <class F>
SWITCHKD_HOST_DEVICE Mixture<F> mixture(const Entry<F>& x, float a, float b) {
  F of_larger = by_larger(x, F(a), F(b)), of_smaller = by_larger(x, F(b), F(a));
  F drop = of_smaller * x.drop, share = of_smaller * x.ratio + of_larger;
  Split<F> parts = split(share);
  F f = select(parts.power == F(0.0f), drop, parts.f);
  return {a, b, share, log_bend(f) + (parts.power * (LN2 / 8388608.0f) + (f - drop))};
}

// From y, p or q, to m: (m - y) / max(p, q), log(m / y), and the terms m - y - y log(m / y) >= 0 of
// KL(y||m), over max(p, q).
template <class F>
struct Toward {
  F change, log, terms;
};

// y over max(p, q); what Entry has of it where it is the smaller, else 0; the weight of the other,
// negative where y is the smaller.
template <bool NEARER, class F>
SWITCHKD_HOST_DEVICE Toward<F> toward(F y, F drop, F bend, F other, const Entry<F>& x,
                                      const Mixture<F>& m) {
  F change = other * x.drop, rest = bend + m.bend;
  Toward<F> to = {change, change + rest, -(drop * change) - y * rest};
  if (NEARER) {  // m to y than to the other: r = m / y - 1 falls with the other's weight
    F r = change / y, bent = log_bend(r);
    auto near = r < F(0.41f), grows = F(0.0f) < r;
    to.log = select(near, select(grows, r + bent, to.log), to.log);
    to.terms = select(near, select(grows, -y * bent, to.terms), to.terms);
  }
  return to;
}
template <bool NEARER, class F>
SWITCHKD_HOST_DEVICE Toward<F> from_teacher(const Entry<F>& x, const Mixture<F>& m) {
  const F zero = F(0.0f);
  return toward<NEARER>(by_larger(x, F(1.0f), x.ratio), by_larger(x, zero, x.drop),
                        by_larger(x, zero, x.bend), by_larger(x, F(m.b), F(-m.b)), x, m);
}
template <bool NEARER, class F>
SWITCHKD_HOST_DEVICE Toward<F> from_student(const Entry<F>& x, const Mixture<F>& m) {
  const F zero = F(0.0f);
  return toward<NEARER>(by_larger(x, x.ratio, F(1.0f)), by_larger(x, x.drop, zero),
                        by_larger(x, x.bend, zero), by_larger(x, F(-m.a), F(m.a)), x, m);
}

enum Kind : int {
  KL_TEACHER_STUDENT,
  KL_STUDENT_TEACHER,
  GENERALIZED_JSD,
  SKEW_KL,
  SKEW_REVERSE_KL,
  TVD,
  JSD,
  CROSS_ENTROPY,  // no teacher; its terms are added elsewhere
  KINDS,
};

// Over max(p, q): the divergence's term, q, and u = q dL/dq, of which dL/dz = u - q sum u.
template <class F>
struct Term {
  F value, q, slope;  // dL/dq; of KL(p||q), where it has no bound, u
};

template <int KIND, class F>
SWITCHKD_HOST_DEVICE F u_of(const Term<F>& x) {
  return KIND == KL_TEACHER_STUDENT ? x.slope : x.q * x.slope;
}

// Terms of rowwise.values and u of rowwise.gradients, which share their logarithms. For KL(p||q) u
// is q - p, the gradient itself: the sum that is taken off is 0 but for rounding. HEAVY: w > 1/2.
template <int KIND, bool HEAVY, class F>
SWITCHKD_HOST_DEVICE Term<F> divergence_terms(const Entry<F>& x, float w, bool detach) {
  const F zero = F(0.0f), q = by_larger(x, x.ratio, F(1.0f));
  if (KIND == KL_TEACHER_STUDENT)
    return {kl_teacher_student(x), q, by_larger(x, x.drop, -x.drop)};
  if (KIND == KL_STUDENT_TEACHER)
    return {by_larger(x, kl_from_smaller(x), kl_from_larger(x)), q, by_larger(x, -x.u, x.distance)};
  if (KIND == TVD) {
    const F sign = by_larger(x, F(-0.5f), F(0.5f));
    return {x.drop * -0.5f, q, select(x.u > zero, sign, zero)};
  }
  if (KIND == SKEW_KL) {
    const Mixture<F> m = mixture(x, w, 1.0f - w);
    const Toward<F> p = from_teacher<HEAVY>(x, m);
    return {p.terms, q, p.change / m.share * m.b};
  }
  if (KIND == SKEW_REVERSE_KL) {
    const Mixture<F> m = mixture(x, 1.0f - w, w);
    const Toward<F> y = from_student<HEAVY>(x, m);
    return {y.terms, q, detach ? -y.log : y.change / m.share * w - y.log};
  }
  if (KIND == JSD || KIND == GENERALIZED_JSD) {
    const Mixture<F> m = KIND == JSD ? mixture(x, 0.5f, 0.5f) : mixture(x, w, 1.0f - w);
    const Toward<F> y = from_student<KIND != JSD && !HEAVY>(x, m);
    const F value = KIND == JSD ? jsd_factor(x.u, x.ratio * JSD_SCALE) * (0.5f / JSD_SCALE)
                                : from_teacher<HEAVY>(x, m).terms * m.a + y.terms * m.b;
    return {value, q, -y.log * m.b};
  }
  return {zero, q, zero};
}

}  // namespace SWITCHKD_CAPABILITY
}  // namespace switchkd
