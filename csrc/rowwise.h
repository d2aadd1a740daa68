// The mathematics of a pair of rows, for the CPU (a vector of lanes at once) and for CUDA (a float).
//
// The C++ twin of rowwise.py and noise.py, which define it: p teacher, q student, d = log q - log p.
// F is float, or a type with the operators of float and with exp, log, abs, max, select and
// comparisons that return its mask. Nothing here needs a library but the C mathematics.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SWITCHKD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SWITCHKD_HOST_DEVICE inline __attribute__((always_inline))
#endif
#if defined(__CUDA_ARCH__)
#define SWITCHKD_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)  // its pass over the host's code
#define SWITCHKD_UNROLL
#else
#define SWITCHKD_UNROLL _Pragma("GCC unroll 10")
#endif

// One source is compiled for several instruction sets. Each has a namespace of its own: the linker
// keeps one copy of an inline function, and it must not be one that the processor cannot run.
#ifndef SWITCHKD_CAPABILITY
#define SWITCHKD_CAPABILITY scalar
#endif

namespace switchkd {
inline namespace SWITCHKD_CAPABILITY {

constexpr float LN2 = 0.6931471805599453f;

#if defined(__CUDA_ARCH__)  // an instruction each; of a NaN and a number the number
SWITCHKD_HOST_DEVICE float exp(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634f));
  return power;
}
SWITCHKD_HOST_DEVICE float min(float a, float b) { return ::fminf(a, b); }
SWITCHKD_HOST_DEVICE float max(float a, float b) { return ::fmaxf(a, b); }
#else
SWITCHKD_HOST_DEVICE float exp(float x) { return ::expf(x); }
// b if either is NaN, as the instructions of x86 have it.
SWITCHKD_HOST_DEVICE float min(float a, float b) { return a < b ? a : b; }
SWITCHKD_HOST_DEVICE float max(float a, float b) { return a > b ? a : b; }
#endif
SWITCHKD_HOST_DEVICE float exp_in_range(float x) { return exp(x); }  // of -87 <= x <= 88
SWITCHKD_HOST_DEVICE float log(float x) { return ::logf(x); }
SWITCHKD_HOST_DEVICE float abs(float x) { return ::fabsf(x); }
SWITCHKD_HOST_DEVICE float select(bool where, float a, float b) { return where ? a : b; }

// ------------------------------------------------------------------------------- noise

// Philox4x32-10 (Salmon et al. 2011, Random123). W holds a 32-bit word in 64 bits, or many of them;
// what lies above bit 31 is ignored on the way in and undefined on the way out.
SWITCHKD_HOST_DEVICE uint64_t wide_product(uint64_t a, uint32_t b) {
  return static_cast<uint64_t>(static_cast<uint32_t>(a)) * b;
}

template <class W>
struct Words {
  W w0, w1, w2, w3;
};

template <class W>
SWITCHKD_HOST_DEVICE Words<W> philox(uint64_t seed, Words<W> c) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  SWITCHKD_UNROLL
  for (int round = 0; round < 10; ++round) {
    W a = wide_product(c.w0, 0xD2511F53u), b = wide_product(c.w2, 0xCD9E8D57u);
    c.w0 = (b >> 32) ^ c.w1 ^ static_cast<uint64_t>(key0);
    c.w2 = (a >> 32) ^ c.w3 ^ static_cast<uint64_t>(key1);
    c.w1 = b;
    c.w3 = a;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// Where a row's noise is in the field: token v takes word v % 4 of block v / 4.
struct Counter {
  uint64_t seed;
  uint32_t position, low, high;
};

SWITCHKD_HOST_DEVICE Counter counter_of(uint64_t seed, int64_t position, int64_t id, int stream) {
  uint64_t sequence = static_cast<uint64_t>(id);
  return {seed, static_cast<uint32_t>(position), static_cast<uint32_t>(sequence),
          static_cast<uint32_t>(sequence >> 32) | static_cast<uint32_t>(stream) << 24};
}

// -log(-log1p(-u)), u = min((float(word) + 1/2) 2^-32, 1 - 2^-24); falls as the word rises.
SWITCHKD_HOST_DEVICE float gumbel(uint32_t word) {
  float u = (static_cast<float>(word) + 0.5f) * 2.3283064365386963e-10f;
  return -::logf(-::log1pf(-min(u, 0.999999940395355f)));
}

constexpr float GUMBEL_MAX = 22.9f;  // of word 0: 22.874

// gumbel(word) <= -log u <= GUMBEL_AT - GUMBEL_PER_BIT * float(bits of float(word >> 1)): the bits
// of a float, read as an integer, are 2^23 (127 + log2) from below, by at most 0.087 in log2. One
// bit of the word is given up because few processors convert unsigned words.
constexpr float GUMBEL_PER_BIT = 1.1920928955078125e-07f * LN2, GUMBEL_AT = 158.0f * LN2 + 1e-4f;

// ------------------------------------------------------------------------------- functions

// (e^x - 1 - x) / (x^2 / 2) for |x| < 1/2, by its Taylor series; the next term is below rounding.
template <class F>
SWITCHKD_HOST_DEVICE F exp_tail(F x) {
  F s = x * (1.0f / 9) + 1.0f;
  s = x * (1.0f / 8) * s + 1.0f;
  s = x * (1.0f / 7) * s + 1.0f;
  s = x * (1.0f / 6) * s + 1.0f;
  s = x * (1.0f / 5) * s + 1.0f;
  s = x * (1.0f / 4) * s + 1.0f;
  return x * (1.0f / 3) * s + 1.0f;
}

template <class F>
SWITCHKD_HOST_DEVICE F expm1(F x) {
  auto near = abs(x) < F(0.5f);
  F small = select(near, x, F(0.0f));
  return select(near, small + small * small * 0.5f * exp_tail(small), exp(x) - 1.0f);
}

// log(w) + (x - (w - 1)), w = 1 + x rounded: the correction is what rounding took from x. It
// matters where w is near 1, and there its division by w does not.
template <class F>
SWITCHKD_HOST_DEVICE F log1p(F x) {
  F w = x + 1.0f;
  return log(w) + (x - (w - 1.0f));
}

// cap tanh(z / cap)
template <class F>
SWITCHKD_HOST_DEVICE F soft_cap(F z, float cap) {
  F t = expm1(abs(z / F(cap)) * -2.0f);
  return select(z < F(0.0f), t, -t) / (t + 2.0f) * cap;
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
  return {teacher.top,           student.top,          student.top - teacher.top,
          log(student.total / teacher.total), 1.0f / teacher.total, 1.0f / student.total};
}

template <class F>
struct Entry {
  F p, q, d;  // probabilities, log q - log p (0 where both vanish)
};

template <class F>
SWITCHKD_HOST_DEVICE F log_ratio(F teacher, F student, const Shift& by) {
  return ((student - teacher) - by.tops) - by.logs;  // NaN for -inf in both rows
}

// p and q each by an exponential of its own: of a common large offset d keeps less than they do.
template <class F>
SWITCHKD_HOST_DEVICE Entry<F> compare(F teacher, F student, const Shift& by) {
  F d = log_ratio(teacher, student, by);
  return {exp(teacher - by.teacher_top) * by.teacher_inverse,
          exp(student - by.student_top) * by.student_inverse, select(d == d, d, F(0.0f))};
}

// max(p, q) times the teacher's sum, which spares one of the two exponentials, and its logarithm;
// -inf in both rows counts as -87.
template <class F>
SWITCHKD_HOST_DEVICE F log_larger(F teacher, F student, const Shift& by) {
  F below = min(by.teacher_top - teacher, (by.student_top - student) + by.logs);
  return -min(below, F(87.0f));
}

template <class F>
SWITCHKD_HOST_DEVICE F larger(F teacher, F student, const Shift& by) {
  return exp_in_range(log_larger(teacher, student, by));
}

// ------------------------------------------------------------------------------- divergences

// m h(tanh(d / 2)), m = (p + q) / 2, h(tanh s) = s tanh s - log cosh s, with x = max(p, q) and
// e = e^-|d|, so that m = x (1 + e) / 2. Near 0 h is d^2 by a polynomial in d^2, else the same terms
// gathered, (1 + e) (ln 2 - log1p(e)) - |d| e, lose less than a digit, and the first of them is a
// polynomial in e <= e^-1. Both by minimax, of relative error 2.8e-8 and 5.5e-8. A d of NaN,
// where larger() is e^-87, adds nothing: it is 0 on a CPU and 87 under CUDA.
template <class F>
SWITCHKD_HOST_DEVICE F jsd_factor(F d) {  // of x / 2
  F a = max(min(F(87.0f), abs(d)), F(0.0f)), a2 = a * a, e = exp_in_range(-a);
  F near = a2 * 1.5079555731e-5f - 1.8115312355e-4f;
  near = a2 * near + 1.7350388489e-3f;
  near = a2 * near - 1.5624890518e-2f;
  near = a2 * near + 0.125f;
  near = a2 * near;
  F far = e * 2.5064479615e-2f - 7.3974023944e-2f;
  far = e * far + 1.6487731458e-1f;
  far = e * far - 4.9983576152e-1f;
  far = e * far - 3.0685867955e-1f;
  far = e * far + 6.9314721836e-1f;
  return select(a < F(1.0f), near * e + near, far - a * e);
}

template <class F>
SWITCHKD_HOST_DEVICE F jsd_terms(F x, F d) {
  return jsd_factor(d) * (x * 0.5f);
}

// y - x - x e >= 0 of KL(x||y), e = log y - log x; a series near e = 0; y where x is 0.
template <class F>
SWITCHKD_HOST_DEVICE F kl_terms(F x, F y, F e) {
  auto close = abs(e) < F(0.5f);
  F small = select(close, e, F(0.0f));
  F near = x * small * small * 0.5f * exp_tail(small);
  return select(x > F(0.0f), select(close, near, y - x - x * e), y);
}

// log(w + (1 - w) e^d) = log1p((1 - w) (e^d - 1)) = d + log1p(w (e^-d - 1)), 0 < w < 1: the first
// form never cancels, the second never overflows.
template <class F>
SWITCHKD_HOST_DEVICE F log_mix(F d, float w) {
  auto large = d > F(1.0f);
  F x = expm1(select(large, -d, d)) * select(large, F(w), F(1.0f - w));
  return log1p(x) + select(large, d, F(0.0f));
}

// q - p, without cancellation where they are near.
template <class F>
SWITCHKD_HOST_DEVICE F difference(const Entry<F>& x) {
  auto near = abs(x.d) < F(0.5f);
  F small = select(near, x.d, F(0.0f));
  return select(near, x.p * (small + small * small * 0.5f * exp_tail(small)), x.q - x.p);
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

template <class F>
struct Term {
  F value, u;  // of the divergence, and q dL/dq: dL/dz = u - q sum u
};

// Terms of rowwise.values and u of rowwise.gradients, which share their logarithms. For KL(p||q) u
// is q - p, the gradient itself: the sum that is taken off is 0 but for rounding.
template <int KIND, class F>
SWITCHKD_HOST_DEVICE Term<F> divergence_terms(const Entry<F>& x, float w, bool detach) {
  const F zero = F(0.0f);
  F p = x.p, q = x.q, d = x.d;
  if (KIND == CROSS_ENTROPY) return {zero, zero};
  if (KIND == KL_TEACHER_STUDENT) return {kl_terms(p, q, d), difference(x)};
  if (KIND == KL_STUDENT_TEACHER) return {kl_terms(q, p, -d), select(q > zero, q * d, zero)};
  if (KIND == TVD) {
    F sign = select(d > zero, F(0.5f), select(d < zero, F(-0.5f), zero));
    return {abs(difference(x)) * 0.5f, q * sign};
  }
  if (KIND == SKEW_KL) {
    F mix = log_mix(d, w);  // log m / p
    return {kl_terms(p, p * w + q * (1.0f - w), mix), q * (w - 1.0f) * expm1(-mix)};
  }
  if (KIND == SKEW_REVERSE_KL) {
    F mix = log_mix(-d, w);  // log m / q
    F u = detach ? mix : mix + expm1(-mix) * w;
    return {kl_terms(q, p * (1.0f - w) + q * w, mix), select(q > zero, -q * u, zero)};
  }
  if (KIND == JSD) {
    return {jsd_terms(max(p, q), d), select(q > zero, q * -0.5f * log_mix(-d, 0.5f), zero)};
  }
  F m = p * w + q * (1.0f - w), mix = log_mix(-d, 1.0f - w);
  F value = kl_terms(p, m, log_mix(d, w)) * w + kl_terms(q, m, mix) * (1.0f - w);
  return {value, select(q > zero, q * (w - 1.0f) * mix, zero)};
}

}  // namespace SWITCHKD_CAPABILITY
}  // namespace switchkd
