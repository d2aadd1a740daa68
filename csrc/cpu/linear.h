// y = x W^T + b for few rows x: the pass of a decoder over some tokens.
//
// Every weight is used M times only, so what counts is that it leaves memory once, in order, and is
// not copied on its way: a library's matrix product packs both operands, which for M = 8 costs more
// than the product. Here R weight rows meet C rows of x at a time; R * C accumulators stay in
// registers over the whole of K, and the rows of x in the first cache.

#pragma once

#include "vec.h"

namespace switchkd {
inline namespace SWITCHKD_CAPABILITY {
namespace few {

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof(v)); }

typedef float Four __attribute__((vector_size(16)));

inline Four quarter(const Floats& v) {  // four partial sums of the lanes
  Four part[LANES / 4];
  std::memcpy(part, &v, sizeof(v));
  Four s = part[0];
  for (int64_t i = 1; i < LANES / 4; ++i) s += part[i];
  return s;
}

inline Four sums(Four a, Four b, Four c, Four d) {  // the sum of the lanes of each
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// R rows of W (N, K) with C rows of x (M, K).
template <int R, int C>
void rows(const float* x, int64_t xs, const float* w, int64_t ws, const float* b, float* y,
          int64_t ys, int64_t K) {
  Floats acc[R][C] = {};
  int64_t k = 0;
  for (; k + LANES <= K; k += LANES) {
    Floats weight[R];
    for (int r = 0; r < R; ++r) weight[r] = load(w + r * ws + k);
    for (int c = 0; c < C; ++c) {
      const Floats input = load(x + c * xs + k);
      for (int r = 0; r < R; ++r) acc[r][c] += weight[r] * input;
    }
  }
  for (int c = 0; c < C; ++c) {
    Four part[4] = {};
    for (int r = 0; r < R; ++r) part[r] = quarter(acc[r][c]);
    const Four total = sums(part[0], part[1], part[2], part[3]);
    for (int r = 0; r < R; ++r) {
      float t = total[r] + (b ? b[r] : 0.0f);
      for (int64_t i = k; i < K; ++i) t += w[r * ws + i] * x[c * xs + i];
      y[c * ys + r] = t;
    }
  }
}

template <int R>
void some(int64_t count, const float* x, int64_t xs, const float* w, int64_t ws, const float* b,
          float* y, int64_t ys, int64_t K) {
  switch (count) {
    case 1: return rows<R, 1>(x, xs, w, ws, b, y, ys, K);
    case 2: return rows<R, 2>(x, xs, w, ws, b, y, ys, K);
    case 3: return rows<R, 3>(x, xs, w, ws, b, y, ys, K);
    case 4: return rows<R, 4>(x, xs, w, ws, b, y, ys, K);
    case 5: return rows<R, 5>(x, xs, w, ws, b, y, ys, K);
    default: return rows<R, 6>(x, xs, w, ws, b, y, ys, K);
  }
}

// With 32 registers 24 accumulators, 4 weights and 1 input; with 16 of them 8, 4 and 1.
constexpr int kRows = 4, kInputs = LANES == 16 ? 6 : 2;

template <int R>
void all(const float* x, int64_t xs, const float* w, int64_t ws, const float* b, float* y,
         int64_t ys, int64_t M, int64_t K) {
  const int64_t parts = (M + kInputs - 1) / kInputs;
  for (int64_t i = 0; i < parts; ++i) {  // of equal size, so that none leaves registers idle
    const int64_t m = M * i / parts, count = M * (i + 1) / parts - m;
    some<R>(count, x + m * xs, xs, w, ws, b, y + m * ys, ys, K);
  }
}

// For weights (K, N), as GPT-2 stores them: kDepth of their rows at a time are read in order, and the
// sums wait in y.
constexpr int64_t kDepth = 16, kWide = 4;

template <int C, int64_t W>
void columns(const float* x, int64_t xs, const float* w, int64_t ws, float* y, int64_t ys,
             int64_t depth) {
  Floats acc[C][W];
  for (int c = 0; c < C; ++c)
    for (int64_t i = 0; i < W; ++i) acc[c][i] = load(y + c * ys + i * LANES);
  for (int64_t k = 0; k < depth; ++k) {
    Floats weight[W];
    for (int64_t i = 0; i < W; ++i) weight[i] = load(w + k * ws + i * LANES);
    for (int c = 0; c < C; ++c)
      for (int64_t i = 0; i < W; ++i) acc[c][i] += x[c * xs + k] * weight[i];
  }
  for (int c = 0; c < C; ++c)
    for (int64_t i = 0; i < W; ++i) store(y + c * ys + i * LANES, acc[c][i]);
}

template <int64_t W>
void some_columns(int64_t count, const float* x, int64_t xs, const float* w, int64_t ws, float* y,
                  int64_t ys, int64_t depth) {
  switch (count) {
    case 1: return columns<1, W>(x, xs, w, ws, y, ys, depth);
    case 2: return columns<2, W>(x, xs, w, ws, y, ys, depth);
    case 3: return columns<3, W>(x, xs, w, ws, y, ys, depth);
    case 4: return columns<4, W>(x, xs, w, ws, y, ys, depth);
    case 5: return columns<5, W>(x, xs, w, ws, y, ys, depth);
    default: return columns<6, W>(x, xs, w, ws, y, ys, depth);
  }
}

}  // namespace few

// y (M, N) = x (M, K) W (N, K)^T + b for the outputs begin .. end - 1; strides in entries.
inline void linear_rows(const float* x, int64_t xs, const float* w, int64_t ws, const float* b, float* y,
                 int64_t ys, int64_t M, int64_t K, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + few::kRows <= end; n += few::kRows)
    few::all<few::kRows>(x, xs, w + n * ws, ws, b ? b + n : nullptr, y + n, ys, M, K);
  for (; n < end; ++n) few::all<1>(x, xs, w + n * ws, ws, b ? b + n : nullptr, y + n, ys, M, K);
}

// The same with W (K, N), whose stride is that of a row.
inline void linear_columns(const float* x, int64_t xs, const float* w, int64_t ws, const float* b,
                    float* y, int64_t ys, int64_t M, int64_t K, int64_t begin, int64_t end) {
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = begin; n < end; ++n) y[m * ys + n] = b ? b[n] : 0.0f;
  const int64_t parts = (M + few::kInputs - 1) / few::kInputs;
  for (int64_t k = 0; k < K; k += few::kDepth) {
    const int64_t depth = K - k < few::kDepth ? K - k : few::kDepth;
    const float* below = w + k * ws;
    int64_t n = begin;
    for (; n < end;) {
      const int64_t width = n + few::kWide * LANES <= end ? few::kWide * LANES : n + LANES <= end ? LANES : 1;
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t m = M * i / parts, count = M * (i + 1) / parts - m;
        const float* rows = x + m * xs + k;
        float* sums = y + m * ys + n;
        if (width == few::kWide * LANES) {
          few::some_columns<few::kWide>(count, rows, xs, below + n, ws, sums, ys, depth);
        } else if (width == LANES) {
          few::some_columns<1>(count, rows, xs, below + n, ws, sums, ys, depth);
        } else {
          for (int64_t c = 0; c < count; ++c)
            for (int64_t j = 0; j < depth; ++j)
              sums[c * ys] += rows[c * xs + j] * below[j * ws + n];
        }
      }
      n += width;
    }
  }
}

}  // namespace SWITCHKD_CAPABILITY
}  // namespace switchkd
