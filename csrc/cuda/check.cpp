// Drives the kernels of switch_select through their edge cases, without torch: for sanitizers.
//
// Compiled with select.cu, for the CPU (SWITCHKD_EMULATED) or as CUDA for a GPU. Logits lie in
// allocations of their exact size, so that a read beyond one is seen. Exit status 1, and a line for
// each, on failures. An argument of n runs every n-th case.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "../noise.h"
#include "../rowwise.h"
#include "device.h"

using namespace switchkd;
using namespace switchkd::cuda;

namespace {

int failures = 0;

void expect(bool holds, const char* what, double got, double want) {
  if (holds) return;
  std::printf("failed: %s, got %.9g, expected %.9g\n", what, got, want);
  ++failures;
}

// Values where the kernels can read and write them.
template <class T>
class Buffer {
 public:
  explicit Buffer(const std::vector<T>& values) : bytes_(values.size() * sizeof(T)) {
#if defined(SWITCHKD_EMULATED)
    data_ = static_cast<T*>(std::malloc(bytes_));
    if (bytes_ > 0) std::memcpy(data_, values.data(), bytes_);
#else
    if (cudaMalloc(&data_, bytes_) != cudaSuccess) std::abort();
    cudaMemcpy(data_, values.data(), bytes_, cudaMemcpyHostToDevice);
#endif
  }
  ~Buffer() {
#if defined(SWITCHKD_EMULATED)
    std::free(data_);
#else
    cudaFree(data_);
#endif
  }
  Buffer(const Buffer&) = delete;
  T* data() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> found(bytes_ / sizeof(T));
#if defined(SWITCHKD_EMULATED)
    if (bytes_ > 0) std::memcpy(found.data(), data_, bytes_);
#else
    cudaMemcpy(found.data(), data_, bytes_, cudaMemcpyDeviceToHost);
#endif
    return found;
  }

 private:
  T* data_ = nullptr;
  size_t bytes_;
};

struct Case {
  int64_t vocab, offset;  // of the first row from a multiple of 16 bytes, in entries
  Dtype dtype[2];
  Draw draw[2];
  Metric metric;
  float hole;    // logits below it are -inf
  int cluster, splits;
};

constexpr int64_t ROWS = 3;  // one random, one with little between the models, one undefined

std::vector<float> logits(const Case& one, int model) {
  std::vector<float> z(ROWS * one.vocab);
  uint32_t seed = 1;
  for (int64_t i = 0; i < ROWS * one.vocab; ++i) {
    seed = seed * 1664525u + 1013904223u;
    const float x = static_cast<float>(seed >> 20) * (12.0f / 4096) - 6.0f;
    const bool far = i < one.vocab && model == 1;
    z[i] = i % one.vocab > 0 && x < one.hole ? -INFINITY : far ? -x : x + 0.0625f * model * (i % 2);
  }
  z[ROWS * one.vocab - 1] = model == 1 ? NAN : 0.0f;
  return z;
}

uint16_t half_of(float x, Dtype dtype) {  // of values that fit, cut off
  const uint32_t bits = as_bits(x);
  if (dtype == BFLOAT16) return static_cast<uint16_t>(bits >> 16);
  const uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7FFFFFFFu;
  if (rest >= 0x7F800000u) return static_cast<uint16_t>(sign | 0x7C00u | (rest > 0x7F800000u));
  if (rest < 0x38800000u) return static_cast<uint16_t>(sign);  // too small for float16: 0
  return static_cast<uint16_t>(sign | ((rest - 0x38000000u) >> 13));
}

// As the kernel has them: bytes from an offset on, and what they round to, back in `z`.
std::vector<unsigned char> stored(std::vector<float>& z, const Case& one, Dtype dtype) {
  const size_t size = size_of(dtype);
  std::vector<unsigned char> bytes((one.offset + z.size()) * size);
  for (size_t i = 0; i < z.size(); ++i) {
    unsigned char* at = bytes.data() + (one.offset + i) * size;
    if (dtype == FLOAT32) {
      std::memcpy(at, &z[i], 4);
      continue;
    }
    const uint16_t half = half_of(z[i], dtype);
    std::memcpy(at, &half, 2);
    if (dtype == BFLOAT16) {
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      std::memcpy(&z[i], &bits, 4);
    } else if (std::isfinite(z[i])) {
      const int exponent = half >> 10 & 31, mantissa = half & 1023;
      z[i] = exponent == 0 ? 0.0f : std::ldexp(1024.0f + mantissa, exponent - 25);
      if (half & 0x8000u) z[i] = -z[i];
    }
  }
  return bytes;
}

double log_sum(const float* z, int64_t vocab) {
  double total = 0.0;
  for (int64_t i = 0; i < vocab; ++i) total += std::exp(static_cast<double>(z[i]));
  return std::log(total);
}

double divergence(const float* t, const float* s, const Case& one, int64_t rival) {
  const double lt = log_sum(t, one.vocab), ls = log_sum(s, one.vocab);
  double sum = 0.0;
  for (int64_t i = 0; i < one.vocab; ++i) {
    const double a = t[i] - lt, b = s[i] - ls, p = std::exp(a), q = std::exp(b), m = (p + q) / 2;
    if (one.metric == RANK) sum += t[i] > t[rival];
    if (one.metric == KL && p > 0) sum += p * (a - b);
    if (one.metric == JSD_NATS)
      sum += (p > 0 ? p * std::log(p / m) : 0) / 2 + (q > 0 ? q * std::log(q / m) : 0) / 2;
  }
  return one.metric == KL ? std::fmin(sum, 50.0) : sum;
}

// How far a token's perturbed logit is below the largest.
double below_best(const float* z, const Case& one, const Selection& how, int m, int64_t row,
                  int64_t token) {
  double best = -INFINITY, mine = NAN;
  const Counter c = counter_of(how.seed, 3 * row, (row << 40) + 5, how.model[m].stream);
  for (int64_t i = 0; i < one.vocab; ++i) {
    const Words<uint64_t> w =
        philox(c.seed, Words<uint64_t>{static_cast<uint64_t>(i / 4), c.position, c.low, c.high});
    const uint64_t words[4] = {w.w0, w.w1, w.w2, w.w3};
    double y = z[i];
    if (one.draw[m] == NOISE)
      y = z[i] / how.model[m].temperature + gumbel(static_cast<uint32_t>(words[i % 4]));
    best = std::fmax(best, y);
    if (i == token) mine = y;
  }
  return best - mine;
}

void drive(const Case& one) {
  std::vector<float> z[2] = {logits(one, 0), logits(one, 1)};
  const Buffer<unsigned char> teacher(stored(z[0], one, one.dtype[0]));
  const Buffer<unsigned char> student(stored(z[1], one, one.dtype[1]));
  const Buffer<int64_t> known(std::vector<int64_t>{one.vocab - 1, 0, 0});
  const Buffer<int64_t> ids(std::vector<int64_t>{5, (1ll << 40) + 5, (2ll << 40) + 5});
  const Buffer<int64_t> positions(std::vector<int64_t>{0, 3, 6});
  const Buffer<float> thresholds(std::vector<float>{1e-4f, 0.5f, 0.0f});
  const Buffer<int64_t> token(std::vector<int64_t>(ROWS, 1ll << 50));
  const Buffer<unsigned char> writer(std::vector<unsigned char>(ROWS, 7));
  const Buffer<float> value(std::vector<float>(3 * ROWS, -7.0f));

  Selection how = {};
  const unsigned char* data[2] = {teacher.data(), student.data()};
  for (int m = 0; m < 2; ++m) {
    how.model[m] = {data[m] + one.offset * size_of(one.dtype[m]), one.vocab, one.dtype[m],
                    one.draw[m], {known.data(), 1}, m ? 1.0f : 0.7f, m ? 1.0f : 1 / 0.7f,
                    m == 0 && one.metric == RANK};
  }
  how.threshold = {thresholds.data(), 1};
  how.id = {ids.data(), 1};
  how.position = {positions.data(), 1};
  how.seed = ~0ull;
  how.rows = ROWS;
  how.vocab = one.vocab;
  how.metric = one.metric;
  how.token = token.data();
  how.writer = reinterpret_cast<bool*>(writer.data());
  how.value = value.data();
  how.plan = one.cluster ? resident_plan(one.vocab, one.dtype[0], one.dtype[1], one.cluster)
                         : streaming_plan(one.vocab, one.dtype[0], one.dtype[1], one.splits);
  const Buffer<float> partial(std::vector<float>(partial_floats(ROWS, how.plan.splits), NAN));
  how.partial = partial.data();
  const char* error = launch(how, nullptr);
#if !defined(SWITCHKD_EMULATED)
  if (error == nullptr && cudaDeviceSynchronize() != cudaSuccess)
    error = cudaGetErrorString(cudaGetLastError());
#endif
  if (error != nullptr) {
    std::printf("failed: %s\n", error);
    std::exit(1);
  }

  const auto tokens = token.values();
  const auto writers = writer.values();
  const auto values = value.values();
  for (int64_t row = 0; row < ROWS; ++row) {
    const float* t = z[0].data() + row * one.vocab;
    const float* s = z[1].data() + row * one.vocab;
    if (row == ROWS - 1) {
      expect(tokens[row] == -1 && std::isnan(values[row]), "an undefined row", values[row], NAN);
      continue;
    }
    expect(tokens[row] >= 0 && tokens[row] < one.vocab, "token", tokens[row], one.vocab);
    if (tokens[row] < 0 || tokens[row] >= one.vocab) continue;
    const int m = writers[row] ? 0 : 1;
    const float* z_writer = m ? s : t;
    if (one.draw[m] == KNOWN) expect(tokens[row] == (row ? 0 : one.vocab - 1), "known token", 0, 0);
    else {
      const double below = below_best(z_writer, one, how, m, row, tokens[row]);
      expect(below < 1e-4, "distance of a token from the best", below, 0);
    }
    const double rival = one.draw[1] == KNOWN ? (row ? 0 : one.vocab - 1) : tokens[row];
    if (one.metric != RANK || m == 1 || one.draw[1] == KNOWN) {
      const double want = divergence(t, s, one, static_cast<int64_t>(rival));
      expect(std::fabs(values[row] - want) <= 1e-5 * std::fabs(want) + 1e-7, "divergence",
             values[row], want);
    }
    expect((values[row] > (row ? 0.5f : 1e-4f)) == (writers[row] == 1), "writer", writers[row], m);
    for (int k = 0; k < 2; ++k) {
      const double want = (k ? s : t)[tokens[row]] - log_sum(k ? s : t, one.vocab);
      const float got = values[(1 + k) * ROWS + row];
      expect(got == want || std::fabs(got - want) < 1e-4, "log-probability", got, want);
    }
  }
}

}  // namespace

int main(int count, char** words) {
  const Dtype pairs[][2] = {{FLOAT32, FLOAT32}, {BFLOAT16, BFLOAT16}, {FLOAT16, FLOAT16},
                            {BFLOAT16, FLOAT32}};
  const Draw draws[][2] = {{NOISE, NOISE}, {NOISE, KNOWN}, {GREEDY, NOISE}, {KNOWN, GREEDY}};
  const int splits[][2] = {{1, 1}, {2, 1}, {8, 1}, {0, 1}, {0, 3}};  // cluster, splits
  const int every = count > 1 ? std::atoi(words[1]) : 1;
  int turn = 0;
  for (int64_t vocab : {1, 2, 7, 32, TILE - 1, TILE + 1, 3 * TILE + 5})
    for (const auto& pair : pairs)
      for (const auto& split : splits)
        for (int more = 0; more < 3; ++more) {
          if (turn++ % every != 0) continue;
          const auto& draw = draws[turn % 4];
          drive({vocab, turn % 9, {pair[0], pair[1]}, {draw[0], draw[1]},
                 static_cast<Metric>(more), turn % 2 ? -7.0f : 0.0f, split[0], split[1]});
        }
  std::printf("%d cases, %d failures\n", (turn + every - 1) / every, failures);
  return failures > 0;
}
