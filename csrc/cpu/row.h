// Rows in blocks of floats, whatever they are in memory.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace switchkd {
inline namespace SWITCHKD_CAPABILITY {

constexpr int BLOCK = 512, GROUP = 4 * LANES;  // a group of tokens shares two calls of Philox

SWITCHKD_INLINE int padded(int64_t count) {
  return static_cast<int>((count + GROUP - 1) / GROUP * GROUP);
}

// A second sweep goes from the last block to the first: what the cache holds of a long row is its end.
SWITCHKD_INLINE int64_t last_block(int64_t start, int64_t end) {
  return start + (end - start - 1) / BLOCK * BLOCK;
}

// `count` logits from column `first`, in place where they are floats and fill the block, else in
// `buffer`, -inf up to the end of the last group.
SWITCHKD_INLINE const float* load_block(
    const Logits& logits, int64_t row, int64_t first, int count, float* buffer) {
  int64_t at = row * logits.stride + first;
  if (!logits.bfloat16) {
    const float* from = static_cast<const float*>(logits.data) + at;
    if (count == BLOCK) return from;
    std::memcpy(buffer, from, count * sizeof(float));
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(logits.data) + at;
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(buffer + i, load_bfloat16(from + i));
    if (i < count) {
      uint16_t rest[LANES] = {};
      std::memcpy(rest, from + i, (count - i) * sizeof(uint16_t));
      store(buffer + i, load_bfloat16(rest));
    }
  }
  for (int i = count; i < padded(count); ++i) buffer[i] = -INFINITY;
  return buffer;
}

SWITCHKD_INLINE bool as_given(const Pair& pair, int model) {
  return pair.bias[model] == nullptr && pair.scale == 1.0f && pair.cap == 0.0f;
}

// Whether full blocks are to be read as they lie: bfloat16 of both models, so that equal rows are
// summed in the same order.
SWITCHKD_INLINE bool in_halves(const Pair& pair) {
  for (int m = 0; m < 2; ++m)
    if (pair.model[m].data != nullptr && !(pair.model[m].bfloat16 && as_given(pair, m))) return false;
  return true;
}

SWITCHKD_INLINE const uint16_t* halves(const Logits& logits, int64_t row, int64_t first) {
  return static_cast<const uint16_t*>(logits.data) + row * logits.stride + first;
}

// The same of a head: its products become logits.
SWITCHKD_INLINE const float* load_logits(
    const Pair& pair, int model, int64_t row, int64_t first, int count, float* buffer) {
  const float* x = load_block(pair.model[model], row, first, count, buffer);
  const float* bias = pair.bias[model];
  if (as_given(pair, model)) return x;
  float rest[BLOCK];
  if (bias != nullptr) {
    bias += first;
    if (count < BLOCK) {
      std::memset(rest, 0, sizeof rest);
      std::memcpy(rest, bias, count * sizeof(float));
      bias = rest;
    }
  }
  for (int i = 0; i < padded(count); i += LANES) {
    Vec z = load(x + i);
    if (bias != nullptr) z = z + load(bias + i);
    z = z * pair.scale;
    if (pair.cap != 0.0f) z = soft_cap(z, pair.cap);
    store(buffer + i, z);
  }
  for (int i = count; i < padded(count); ++i) buffer[i] = -INFINITY;  // a cap made it finite
  return buffer;
}

SWITCHKD_INLINE void store_block(
    const Logits& out, int64_t row, int64_t first, int count, const float* values) {
  int64_t at = row * out.stride + first;
  if (!out.bfloat16) {
    std::memcpy(static_cast<float*>(out.data) + at, values, count * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out.data) + at;
  int i = 0;
  for (; i + LANES <= count; i += LANES) store_bfloat16(to + i, load(values + i));
  if (i < count) {
    uint16_t rest[LANES];
    store_bfloat16(rest, load(values + i));
    std::memcpy(to + i, rest, (count - i) * sizeof(uint16_t));
  }
}

SWITCHKD_INLINE Shift shift_of(const Scan models[2]) {
  return shift_of({models[0].top, models[0].total}, {models[1].top, models[1].total});
}

}  // namespace SWITCHKD_CAPABILITY
}  // namespace switchkd
