// Drives every kernel and rowwise.h through their edge cases, without torch: for sanitizers.
//
// Built with kernels.cpp, SWITCHKD_CAPABILITY and SWITCHKD_LANES as that is. Rows lie in allocations
// of their exact size, so that a read beyond one is seen. Exit status 1, and a line, on any failure.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.h"
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
      const Totals sums = run.totals(pair, scans, loss, true, row, 0, vocab);
      expect(sums.value >= 0.0f, "loss", sums.value);
      const Upstream upstream{1.0f, sums.u, 0.5f, vocab - 1};
      run.gradient(pair, scans, loss, upstream, out.logits(), row, 0, vocab);
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

// rowwise.h in scalars, as a CUDA thread has it.
void drive_terms() {
  for (int i = 0; i < 400; ++i) {
    const float x = -80.0f + 0.4f * static_cast<float>(i) * (i % 2 ? 0.5f : 0.001f);
    expect(near(expm1(x), std::expm1(static_cast<double>(x)), 4e-7), "expm1", x);
    if (x > -1.0f) expect(near(log1p(x), std::log1p(static_cast<double>(x)), 4e-7), "log1p", x);
  }
  for (double d : {0.0, 1e-6, -1e-3, 0.49, -0.51, 0.99, 1.01, -3.0, 40.0, -90.0}) {
    const double p = 1e-3, q = p * std::exp(d), w = 0.3;
    const Entry<float> x{static_cast<float>(p), static_cast<float>(q), static_cast<float>(d)};
    const double e = std::expm1(d), m = (p + q) / 2;
    const double exact[] = {q - p - p * d, p - q + q * d};
    if (std::fabs(d) > 0.4 && q > 0 && q < 1e30) {
      expect(near(kl_terms(x.p, x.q, x.d), exact[0], 1e-5), "KL(p||q)", d);
      expect(near(kl_terms(x.q, x.p, -x.d), exact[1], 1e-5), "KL(q||p)", d);
      const double jsd = (p * std::log(p / m) + q * std::log(q / m)) / 2;
      expect(near(jsd_terms(max(x.p, x.q), x.d), jsd, 1e-5), "JSD", d);
    }
    expect(near(difference(x), p * e, 1e-4), "q - p", d);
    expect(near(log_mix(x.d, 0.3f), std::log1p((1 - w) * e), 1e-5), "log mixture", d);
  }
  const Entry<float> nothing{0.0f, 0.0f, 0.0f}, only_p{0.5f, 0.0f, -INFINITY};
  const Entry<float> only_q{0.0f, 0.5f, INFINITY};
  expect(jsd_terms(0.0f, 0.0f) == 0.0f, "JSD of nothing", 0);
  expect(jsd_terms(0.5f, static_cast<float>(NAN)) == 0.0f, "JSD where d is undefined", 0);
  expect(kl_terms(0.0f, 0.0f, 0.0f) == 0.0f, "KL of nothing", 0);
  expect(near(jsd_terms(0.5f, only_p.d), 0.25 * std::log(2.0), 1e-6), "JSD of p alone", 0);
  expect(near(jsd_terms(0.5f, only_q.d), 0.25 * std::log(2.0), 1e-6), "JSD of q alone", 0);
  expect(kl_terms(0.5f, 0.0f, -INFINITY) == INFINITY, "KL where y alone is 0", 0);
  expect(kl_terms(0.0f, 0.5f, INFINITY) == 0.5f, "KL where x is 0", 0);
  expect(near(log_mix(-INFINITY, 0.3f), std::log(0.3), 1e-6), "log mixture of p alone", 0);
  expect(divergence_terms<TVD>(only_q, 0.0f, false).value == 0.25f, "TVD of q alone", 0);
  expect(divergence_terms<SKEW_KL>(nothing, 0.1f, false).u == 0.0f, "u of nothing", 0);
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
  drive_terms();
  return failures > 0;
}
