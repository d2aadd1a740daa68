// What the ops ask of the kernels: slices of rows, so that it may split either. No torch here.
#pragma once

#include <cstdint>

namespace switchkd {

// (M, V) logits of one model: rows of any stride (in entries), each contiguous; float or bfloat16.
struct Logits {
  void* data;
  int64_t stride;
  bool bfloat16;
};

// Two models' logits. Those of heads have yet to be made of products x: cap tanh(scale (x + bias) /
// cap), where a bias may be absent and a cap of 0 is none. Without a teacher its data is null.
struct Pair {
  Logits model[2];  // teacher, student
  int64_t vocab;
  const float* bias[2] = {nullptr, nullptr};
  float scale = 1.0f, cap = 0.0f;
};

enum Draw : int { NONE, GREEDY, NOISE };
enum Metric : int { RANK, KL, JSD_NATS };

// How tokens are drawn: argmax(z / T + G), of those with floor <= z / T and z / T > below.
struct Sampling {
  Draw draw[2] = {NONE, NONE};
  float temperature[2] = {1.0f, 1.0f};
  int stream[2] = {0, 0};
  uint64_t seed = 0;
  int64_t id = 0, position = 0;
  bool softmax = true;  // whether totals are wanted; without, they only tell undefined rows
  bool filtered = false;
  float floor = 0.0f, below = 0.0f;
};

// Of one model, all or a slice of a row. `total` is NaN for a NaN or +inf, 0 if all are -inf.
struct Scan {
  float top, total;  // maximum and sum of e^(z - top); of z / T where filtered
  float best;        // largest perturbed logit
  int64_t token;     // its token
};

struct Filter {
  int64_t top_k;  // 0: none
  float top_p;    // 1: none
  float log_min_p;
};

struct Loss {
  int kind;  // Kind of rowwise.h
  float weight;
  bool detach;
};

struct Totals {
  float value, u;
};

// The gradient is scale (u - q total + ce_weight (q - onehot(label))) before it goes through a head.
struct Upstream {
  float scale, total;  // total: sum u
  float ce_weight;
  int64_t label;  // -1: none
};

// y (M, N) = x (M, K) W^T + b for the outputs [begin, end); W is (N, K), transposed (K, N), b may be
// null. Strides are those of rows, in entries.
typedef void (*Linear)(const float* x, int64_t x_stride, const float* w, int64_t w_stride,
                       const float* b, float* y, int64_t y_stride, int64_t M, int64_t K,
                       int64_t begin, int64_t end);

// One for each instruction set. Columns [start, end) of a row; start is a multiple of SLICE.
struct Kernels {
  void (*scan)(const Pair&, const Sampling&, int64_t row, int64_t start, int64_t end, Scan out[2]);
  float (*measure)(const Pair&, const Scan[2], Metric, float rival, int64_t row, int64_t start,
                   int64_t end);
  int64_t (*filtered_token)(const Pair&, Sampling, const Filter&, int64_t row);
  // The loss and sum u; `slopes` of the row, where it is not null, for unit_gradient.
  Totals (*totals)(const Pair&, const Scan[2], const Loss&, bool needs_u, float* slopes,
                   int64_t row, int64_t start, int64_t end);
  // Turns slopes into the gradient, `total` being sum u. For as long as the row is in the cache.
  void (*unit_gradient)(const Pair&, const Scan& student, const Loss&, float total, float* slopes,
                        int64_t row, int64_t start, int64_t end);
  // Writes the gradient to `out`, which may be the student's own logits.
  void (*gradient)(const Pair&, const Scan[2], const Loss&, const Upstream&, const Logits& out,
                   int64_t row, int64_t start, int64_t end);
  float (*logit)(const Pair&, int model, int64_t row, int64_t token);
  Linear linear, linear_transposed;
};

constexpr int64_t SLICE = 512;

inline namespace baseline { extern const Kernels KERNELS; }
inline namespace avx2 { extern const Kernels KERNELS; }
inline namespace avx512 { extern const Kernels KERNELS; }

}  // namespace switchkd
