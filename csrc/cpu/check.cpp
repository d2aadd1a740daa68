// Drives every kernel and rowwise.h through their edge cases, without torch: for sanitizers.
//
// Built with kernels.cpp, SWITCHKD_CAPABILITY and SWITCHKD_LANES as that is. Rows lie in allocations
// of their exact size, so that a read beyond one is seen. Exit status 1, and a line, on any failure.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "kernels.h"
#include "../noise.h"
#include "../rowwise.h"

using namespace switchkd;

namespace {

const Kernels& run = switchkd::SWITCHKD_CAPABILITY::KERNELS;
int failures = 0;

void expect(bool holds, const char* what, double got) {
  if (holds) return;
  std::printf("failed: %s, got %.9g\n", what, got);
  ++failures;
}

bool near(double a, double b, double relative) {
  return std::fabs(a - b) <= relative * std::fmax(std::fabs(b), 1e-30);
}

// (2, V) logits, every row `offset` entries from the start of an allocation of its exact size.
struct Rows {
  int64_t vocab, stride;
  bool bfloat16;
  char* memory;
  Rows(int64_t vocab, int64_t offset, bool bfloat16)
      : vocab(vocab), stride(vocab + offset), bfloat16(bfloat16),
        memory(static_cast<char*>(std::malloc(2 * (vocab + offset) * (bfloat16 ? 2 : 4)))),
        first(offset) {}
  ~Rows() { std::free(memory); }
  Rows(const Rows&) = delete;
  int64_t first;
  void set(int64_t row, int64_t column, float x) {
    const int64_t at = first + row * stride + column;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (bfloat16) std::memcpy(memory + 2 * at, &half, 2);
    else std::memcpy(memory + 4 * at, &x, 4);
  }
  float get(int64_t row, int64_t column) const {
    const int64_t at = first + row * stride + column;
    float x;
    uint16_t half;
    if (!bfloat16) return std::memcpy(&x, memory + 4 * at, 4), x;
    std::memcpy(&half, memory + 2 * at, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    return std::memcpy(&x, &bits, 4), x;
  }
  Logits logits() const { return {memory + first * (bfloat16 ? 2 : 4), stride, bfloat16}; }
};

void fill(Rows& z, uint32_t seed, float hole) {
  for (int64_t row = 0; row < 2; ++row) {
    for (int64_t i = 0; i < z.vocab; ++i) {
      seed = seed * 1664525u + 1013904223u;
      const float x = static_cast<float>(seed >> 8) * (12.0f / (1 << 24)) - 6.0f;
      z.set(row, i, i > 0 && x < hole ? -INFINITY : x);
    }
  }
}

void drive(int64_t vocab, int64_t offset, bool bfloat16, float hole) {
  Rows teacher(vocab, offset, bfloat16), student(vocab, offset, bfloat16);
  Rows out(vocab, offset, bfloat16);
  fill(teacher, 1, hole);
  fill(student, 2, hole);
  Pair pair{{teacher.logits(), student.logits()}, vocab};
  Sampling how;
  how.draw[0] = how.draw[1] = NOISE;
  how.temperature[0] = 0.7f;
  how.seed = ~0ull;
  how.id = (1ll << 55) + 3;
  how.position = 0xFFFFFFFFll;
  Scan scans[2];
  for (int64_t row = 0; row < 2; ++row) {
    run.scan(pair, how, row, 0, vocab, scans);
    for (int m = 0; m < 2; ++m) {
      const Rows& z = m ? student : teacher;
      double total = 0.0, best = -INFINITY;
      int64_t token = 0;
      float top = -INFINITY;
      for (int64_t i = 0; i < vocab; ++i) top = max(top, z.get(row, i));
      for (int64_t i = 0; i < vocab; ++i) {
        total += std::exp(static_cast<double>(z.get(row, i)) - top);
        const Counter c = counter_of(how.seed, how.position, how.id, 0);
        const uint64_t block = static_cast<uint64_t>(i / 4);
        const Words<uint64_t> w = philox(c.seed, Words<uint64_t>{block, c.position, c.low, c.high});
        const uint64_t words[4] = {w.w0, w.w1, w.w2, w.w3};
        const float noise = gumbel(static_cast<uint32_t>(words[i % 4]));
        const double y = z.get(row, i) / how.temperature[m] + noise;
        if (y > best) best = y, token = i;
      }
      expect(scans[m].top == top, "maximum", scans[m].top);
      expect(near(scans[m].total, total, 1e-6), "sum of exponentials", scans[m].total);
      expect(scans[m].token == token, "token", static_cast<double>(scans[m].token));
    }
    for (Metric metric : {RANK, KL, JSD_NATS}) {
      const float d = run.measure(pair, scans, metric, 0.0f, row, 0, vocab);
      expect(d >= 0.0f, "divergence", d);
      if (metric == JSD_NATS) expect(d <= 0.6931473f, "JSD", d);
    }
    for (int64_t k : {int64_t{0}, int64_t{1}, vocab / 2}) {
      const int64_t token = run.filtered_token(pair, how, {k, 0.9f, -3.0f}, row);
      expect(token >= 0 && token < vocab, "filtered token", static_cast<double>(token));
      if (k == 1) expect(student.get(row, token) == scans[1].top, "top-1", student.get(row, token));
    }
    for (int kind = 0; kind < KINDS; ++kind) {
      const Loss loss{kind, 0.3f, false};
      std::vector<float> unit(vocab);
      const Totals sums = run.totals(pair, scans, loss, true, unit.data(), row, 0, vocab);
      run.unit_gradient(pair, scans[1], loss, sums.u, unit.data(), row, 0, vocab);
      expect(sums.value >= 0.0f, "loss", sums.value);
      const Upstream upstream{1.0f, sums.u, 0.5f, vocab - 1};
      run.gradient(pair, scans, loss, upstream, out.logits(), row, 0, vocab);
      if (bfloat16 || std::isinf(sums.value)) continue;  // rounded; not defined
      const Upstream plain{1.0f, sums.u, 0.0f, -1};
      run.gradient(pair, scans, loss, plain, out.logits(), row, 0, vocab);
      for (int64_t i = 0; i < vocab; ++i)
        expect(std::fabs(unit[i] - out.get(row, i)) < 1e-6, "gradient in one go", unit[i]);
    }
  }
  for (float bad : {static_cast<float>(NAN), static_cast<float>(INFINITY)}) {
    student.set(1, vocab - 1, bad);
    run.scan(pair, how, 1, 0, vocab, scans);
    expect(std::isnan(scans[1].total), "total of an undefined row", scans[1].total);
    expect(run.filtered_token(pair, how, {1, 0.5f, -1.0f}, 1) == -1, "its token", 0);
  }
  for (int64_t i = 0; i < vocab; ++i) student.set(0, i, -INFINITY);
  run.scan(pair, how, 0, 0, vocab, scans);
  expect(scans[1].total == 0.0f, "total of a row of -inf", scans[1].total);
  run.scan(pair, how, 0, 0, 0, scans);
  expect(scans[0].total == 0.0f, "total of nothing", scans[0].total);
}

// Of one pair of entries with logarithms a and b of probabilities.
Entry<float> entry(double a, double b) {
  return compare(static_cast<float>(a), static_cast<float>(b), Shift{0, 0, 0, 0, 1, 1});
}

// y - x - x log(y / x), of KL(x||y), by its series where it cancels.
double kl(double x, double y) {
  const double r = y / x - 1;
  if (std::fabs(r) < 1e-3) return x * r * r * (0.5 - r / 3 + r * r / 4 - r * r * r / 5);
  return y - x - x * std::log(y / x);
}

// Every kind against the same in double precision.
template <bool HEAVY>
void drive_kinds(double log_p, double log_q, float w) {
  const Entry<float> x = entry(log_p, log_q);
  const double p = std::exp(static_cast<double>(static_cast<float>(log_p)));
  const double q = std::exp(static_cast<double>(static_cast<float>(log_q)));
  auto check = [&](const Term<float>& got, double u, double value, double slope, const char* what) {
    expect(near(got.value * x.larger, value, 2e-6), what, got.value * x.larger / value - 1);
    expect(near(got.q * x.larger, q, 2e-6), "q", log_q);
    expect(std::fabs(u - slope) <= 2e-6 * std::fabs(slope) + 1e-30, what, u / slope - 1);
  };
  auto sloped = [&](const Term<float>& got, double value, double slope, const char* what) {
    check(got, got.slope, value, slope, what);
  };
  const Term<float> forward = divergence_terms<KL_TEACHER_STUDENT, HEAVY>(x, w, false);
  check(forward, u_of<KL_TEACHER_STUDENT>(forward) * x.larger, kl(p, q), q - p, "KL(p||q)");
  const double d = static_cast<double>(static_cast<float>(log_q)) - static_cast<float>(log_p);
  sloped(divergence_terms<KL_STUDENT_TEACHER, HEAVY>(x, w, false), kl(q, p), d, "KL(q||p)");
  const double sign = q > p ? 0.5 : q < p ? -0.5 : 0.0;
  sloped(divergence_terms<TVD, HEAVY>(x, w, false), std::fabs(q - p) / 2, sign, "TVD");
  const double v = w, half = (p + q) / 2;
  double m = v * p + (1 - v) * q;
  // log(m / q) and 1 - y / m, by what p and q have apart
  auto log_to_q = [&](double of_p) { return std::log1p(of_p * std::expm1(-d)); };
  sloped(divergence_terms<SKEW_KL, HEAVY>(x, w, false), kl(p, m), (1 - v) * (1 - v) * (q - p) / m, "SKL");
  sloped(divergence_terms<GENERALIZED_JSD, HEAVY>(x, w, false), v * kl(p, m) + (1 - v) * kl(q, m),
         (v - 1) * log_to_q(v), "generalised JSD");
  m = (1 - v) * p + v * q;
  const double mix = log_to_q(1 - v);
  sloped(divergence_terms<SKEW_REVERSE_KL, HEAVY>(x, w, true), kl(q, m), -mix, "SRKL, detached");
  const Term<float> srkl = divergence_terms<SKEW_REVERSE_KL, HEAVY>(x, w, false);
  const double slope = v * (1 - v) * (p - q) / m - mix;  // both parts fall with d
  expect(std::fabs(srkl.slope - slope) <= 2e-6 * (std::fabs(mix) + 1e-30), "SRKL", srkl.slope);
  sloped(divergence_terms<JSD, HEAVY>(x, w, false), (kl(p, half) + kl(q, half)) / 2,
         -0.5 * log_to_q(0.5), "JSD");
}

// The JSD of two rows of two entries, over all of the distances that its terms have, and from rows
// that one number sets apart.
void drive_jsd() {
  Rows teacher(2, 0, false), student(2, 0, false);
  const Pair pair{{teacher.logits(), student.logits()}, 2};
  for (float apart : {0.0f, 5.0f, 4096.0f}) {
    for (double x = 1e-3; x < 60.0; x *= 1.003) {
      Scan scans[2];
      double p[2], q[2], terms = 0.0;
      teacher.set(0, 0, 0.0f);
      teacher.set(0, 1, 0.5f);
      student.set(0, 0, apart);
      student.set(0, 1, apart - static_cast<float>(x));
      const double t = -0.5, s = static_cast<double>(apart) - student.get(0, 1);
      p[0] = 1 / (1 + std::exp(-t)), p[1] = p[0] * std::exp(-t);
      q[0] = 1 / (1 + std::exp(-s)), q[1] = q[0] * std::exp(-s);
      for (int i = 0; i < 2; ++i) {
        const double m = (p[i] + q[i]) / 2;
        terms += (kl(p[i], m) + kl(q[i], m)) / 2;
      }
      run.scan(pair, Sampling(), 0, 0, 2, scans);
      const float got = run.measure(pair, scans, JSD_NATS, 0.0f, 0, 0, 2);
      expect(near(got, terms, 1e-6), "JSD", got / terms - 1);
    }
  }
}

// rowwise.h in scalars, as a CUDA thread has it.
void drive_terms() {
  for (double d : {0.0, 1e-6, -1e-3, 0.02, -0.3, 0.49, -0.51, 0.99, 1.01, -3.0, 8.0, -40.0, 80.0})
    for (float w : {0.001f, 0.06f, 0.3f, 0.5f, 0.9f, 0.999f})
      (w > 0.5f ? drive_kinds<true> : drive_kinds<false>)(
          d > 0 ? -2.0 - d : -2.0, d > 0 ? -2.0 : -2.0 + d, w);
  for (int i = 1; i < 400; ++i) {
    const float x = 0.001f * static_cast<float>(i), y = -0.2f * static_cast<float>(i % 300);
    const Split<float> parts = split(x);
    const double log = parts.power * (std::log(2.0) / 8388608) + parts.f + log_bend(parts.f);
    expect(near(log, std::log(static_cast<double>(x)), 1e-6), "logarithm", x);
    const Power<float> e = power(y);
    expect(near(e.scale * (1 + e.r + e.bend), std::exp(static_cast<double>(y)), 4e-7), "power", y);
  }
  const Entry<float> nothing = entry(-INFINITY, -INFINITY);
  const Entry<float> only_p = entry(-1.0, -INFINITY), only_q = entry(-INFINITY, -1.0);
  const float p = std::exp(-1.0f);
  expect(nothing.larger < 1e-37f && nothing.u == 0.0f, "nothing", nothing.larger);
  expect(divergence_terms<KL_TEACHER_STUDENT, false>(nothing, 0.0f, false).value == 0.0f, "its KL", 0);
  expect(divergence_terms<KL_TEACHER_STUDENT, false>(only_p, 0.0f, false).value == INFINITY, "KL of p", 0);
  expect(divergence_terms<KL_STUDENT_TEACHER, false>(only_q, 0.0f, false).value == INFINITY, "KL of q", 0);
  for (const Entry<float>& x : {only_p, only_q}) {
    expect(near(x.larger, p, 1e-6), "the larger", x.larger);
    const Term<float> jsd = divergence_terms<JSD, false>(x, 0.5f, false);
    expect(near(jsd.value * x.larger, p * std::log(2.0) / 2, 1e-6), "JSD of one alone", jsd.value);
    const Term<float> srkl = divergence_terms<SKEW_REVERSE_KL, false>(x, 0.1f, false);
    const double alone = x.teacher ? 0.9 : -0.9 - std::log(0.1);
    expect(near(srkl.value, alone, 1e-6), "SRKL of one alone", srkl.value);
    expect(std::isfinite(u_of<SKEW_REVERSE_KL>(srkl)), "its u", srkl.slope);
  }
  expect(jsd_factor(static_cast<float>(NAN)) == 0.0f, "JSD where d is undefined", 0);
  expect(near(soft_cap(-30.0f, 5.0f), 5 * std::tanh(-6.0), 1e-6), "soft cap", 0);
  expect(soft_cap(-INFINITY, 5.0f) == -5.0f, "soft cap of -inf", soft_cap(-INFINITY, 5.0f));
  expect(gumbel(0) < GUMBEL_MAX && gumbel(~0u) > -4.0f, "Gumbel noise", gumbel(0));
  // Random123's known answer for a counter and a key of ones.
  const uint64_t ones = 0xFFFFFFFFu;
  const Words<uint64_t> w = philox(~0ull, Words<uint64_t>{ones, ones, ones, ones});
  expect(static_cast<uint32_t>(w.w0) == 0x408f276du, "Philox, word 0", static_cast<double>(w.w0));
  expect(static_cast<uint32_t>(w.w3) == 0x6d5451fdu, "Philox, word 3", static_cast<double>(w.w3));
}

}  // namespace

int main() {
  for (int64_t vocab : {1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 511, 512, 513, 1027})
    for (int64_t offset : {0, 1, 3})
      for (bool bfloat16 : {false, true})
        for (float hole : {-7.0f, 0.0f}) drive(vocab, offset, bfloat16, hole);
  drive_jsd();
  drive_terms();
  return failures > 0;
}
