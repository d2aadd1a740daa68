// Softmax and token of rows, the divergence that decides between two, and filters.
#pragma once

#include "terms.h"

namespace switchkd {
inline namespace SWITCHKD_CAPABILITY {

// ------------------------------------------------------------------------------- noise

// Words of tokens 4 block .. 4 block + GROUP - 1, in order. The two calls of Philox are independent,
// and each is as long as its ten rounds are deep, so that they run side by side.
struct GroupWords {
  Bits part[GROUP / LANES];
};

SWITCHKD_INLINE GroupWords group_words(const Counter& counter, uint32_t block) {
  // A lane holds the four words of a block. Interleaving 64 bits of two registers takes lanes 0, 2,
  // .. to the first half and 1, 3, .. to the second, so even lanes hold the first blocks.
  Wide order;
  for (int i = 0; i < LANES / 2; ++i) order[i] = (i % 2) * (LANES / 4) + i / 2;
  const WideWords position{Wide{} + counter.position}, low_id{Wide{} + counter.low};
  const WideWords high_id{Wide{} + counter.high};
  Words<WideWords> w[2];
  for (int i = 0; i < 2; ++i) {
    const WideWords blocks{order + (block + i * LANES / 2)};
    w[i] = philox(counter.seed, Words<WideWords>{blocks, position, low_id, high_id});
  }
  GroupWords words;
  for (int i = 0; i < 2; ++i) {
    Wide a = (w[i].w0.v & 0xFFFFFFFFu) | w[i].w1.v << 32;
    Wide b = (w[i].w2.v & 0xFFFFFFFFu) | w[i].w3.v << 32;
#if SWITCHKD_LANES == 16
    Wide low = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
    Wide high = __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
#elif SWITCHKD_LANES == 8
    Wide low = __builtin_shufflevector(a, b, 0, 4, 2, 6);
    Wide high = __builtin_shufflevector(a, b, 1, 5, 3, 7);
#else
    Wide low = __builtin_shufflevector(a, b, 0, 2), high = __builtin_shufflevector(a, b, 1, 3);
#endif
    words.part[2 * i] = (Bits)low;
    words.part[2 * i + 1] = (Bits)high;
  }
  return words;
}

struct Best {
  float value = -INFINITY;
  int64_t token = 0;
};

// Lanes of y whose noise, by its bound, may lift them above `best`.
SWITCHKD_INLINE unsigned may_win(const float* y, Bits words, const Best& best) {
  Vec bits = to_float((Bits)to_float(words >> 1).v);
  return lanes_of(load(y) - bits * GUMBEL_PER_BIT > Vec(best.value - GUMBEL_AT));
}

// The largest y + G of a group against the best so far, by the two logarithms of G, in scalars.
template <int MODELS>
__attribute__((noinline)) void try_group(
    const float* const y[MODELS], Best* const best[MODELS], int64_t first, const GroupWords& words) {
  for (int part = 0; part < GROUP / LANES; ++part) {
    for (int k = 0; k < MODELS; ++k) {
      const float* z = y[k] + part * LANES;
      for (unsigned lanes = may_win(z, words.part[part], *best[k]); lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        const float value = z[lane] + gumbel(words.part[part][lane]);
        if (value > best[k]->value)  // not >=: of equal values the first wins
          *best[k] = {value, first + part * LANES + lane};
      }
    }
  }
}

// Largest y + G so far, of one or two rows that share their noise. Philox runs only where the
// largest noise could win, and the noise itself only where a bound of it does: of a whole row that
// is a few times.
template <int MODELS>
SWITCHKD_INLINE void noisy_block(
    const float* const y[MODELS], Best* const best[MODELS], int64_t first, int count,
    const Counter& counter) {
  for (int i = 0; i < count; i += GROUP) {
    unsigned lanes = 0;
    for (int k = 0; k < MODELS; ++k) {
      Vec top = load(y[k] + i);
      for (int j = LANES; j < GROUP; j += LANES) top = max(load(y[k] + i + j), top);
      lanes |= lanes_of(top > Vec(best[k]->value - GUMBEL_MAX));
    }
    if (!lanes) continue;
    const GroupWords words = group_words(counter, static_cast<uint32_t>((first + i) / 4));
    lanes = 0;
    for (int part = 0; part < GROUP / LANES; ++part)
      for (int k = 0; k < MODELS; ++k)
        lanes |= may_win(y[k] + i + part * LANES, words.part[part], *best[k]);
    if (!lanes) continue;
    const float* group[MODELS];
    for (int k = 0; k < MODELS; ++k) group[k] = y[k] + i;
    try_group<MODELS>(group, best, first + i, words);
  }
}

// ------------------------------------------------------------------------------- softmax

struct Running {
  float top = -INFINITY;
  Sum total;
  unsigned undefined = 0;  // lanes that met NaN or +inf
};

// What a sweep over a block finds: the largest, and the sum of e^(z - top), which is not to be used
// where one of them is above `top`.
struct Swept {
  Vec tops, total;
  unsigned undefined;
};

template <bool EXPONENTIALS, class T>
SWITCHKD_INLINE Swept sweep_block(const T* z, int count, float top) {
  Twin tops = Twin(-INFINITY), total = Twin(0.0f);
  unsigned ordinary = ~0u;
  for (int i = 0; i < count; i += 2 * LANES) {
    const Twin x = load_twin(z + i);
    tops = max(x, tops);
    if (!EXPONENTIALS) {
      const auto finite = x < Twin(INFINITY);
      ordinary &= lanes_of(finite.a) & lanes_of(finite.b);
      continue;
    }
    __builtin_prefetch(z + i + BLOCK);  // the next block, where the row is in place
    __builtin_prefetch(z + i + BLOCK + LANES);
    const Product<Twin> e = exp_product(max(Twin(LEAST_EXPONENT), x - top));
    total = e.scale * e.s + total;
  }
  return {max(tops.a, tops.b), sum_of(total), ~ordinary & ((1u << LANES) - 1)};
}

// Whether the maximum rises, which is seldom: a block is swept with the maximum of those before it,
// and only if that was too low once more.
template <class T>
SWITCHKD_INLINE bool softmax_block(const T* z, int count, bool exponentials, Running& row) {
  const bool known = exponentials && row.top > -INFINITY;
  Swept block = known ? sweep_block<true>(z, count, row.top) : sweep_block<false>(z, count, 0.0f);
  row.undefined |= block.undefined;
  const bool rises = lanes_of(block.tops > Vec(row.top)) != 0;
  if (rises) {
    const float top = largest(block.tops);
    row.total.scale_by(exp(row.top - top));
    row.top = top;
    if (exponentials) block = sweep_block<true>(z, count, top);
  }
  if (known || rises) row.total.add(block.total);
  return rises;
}

// The first of the largest, `top`, of a block.
template <class T>
SWITCHKD_INLINE void greedy_block(const T* z, float top, int64_t first, Best& best) {
  int i = 0;
  while (widened(z[i]) != top) ++i;
  best = {top, first + i};
}

// z / T, -inf where a filter refuses it; NaN stays, and is found.
SWITCHKD_INLINE const float* tempered_block(
    const float* z, int count, float temperature, const Sampling& how, float* buffer) {
  if (temperature == 1.0f && !how.filtered) return z;
  for (int i = 0; i < count; i += LANES) {
    Vec y = load(z + i) / Vec(temperature);
    if (how.filtered) {
      y = select(y < Vec(how.floor), Vec(-INFINITY), y);
      y = select(y > Vec(how.below), y, select(y == y, Vec(-INFINITY), y));
    }
    store(buffer + i, y);
  }
  return buffer;
}

void scan(const Pair& pair, const Sampling& how, int64_t row, int64_t start, int64_t end,
          Scan out[2]) {
  float buffers[2][BLOCK], scaled[2][BLOCK];
  Running running[2];
  Best best[2];
  const bool noise[2] = {how.draw[0] == NOISE, how.draw[1] == NOISE};
  const bool shared = noise[0] && noise[1] && how.stream[0] == how.stream[1];
  const bool as_halves = !noise[0] && !noise[1] && !how.filtered && in_halves(pair);
  Counter counter[2];
  for (int m = 0; m < 2; ++m)
    counter[m] = counter_of(how.seed, how.position, how.id, how.stream[m]);
  for (int64_t first = start; first < end; first += BLOCK) {
    const int count = static_cast<int>(end - first < BLOCK ? end - first : BLOCK);
    const int wide = padded(count);
    const float* y[2];
    for (int m = 0; m < 2; ++m) {
      if (pair.model[m].data == nullptr) continue;
      if (as_halves && count == BLOCK) {
        const uint16_t* half = halves(pair.model[m], row, first);
        if (softmax_block(half, count, how.softmax, running[m]) && how.draw[m] == GREEDY)
          greedy_block(half, running[m].top, first, best[m]);
        continue;
      }
      const float* z = load_logits(pair, m, row, first, count, buffers[m]);
      y[m] = z;
      if (noise[m] || how.filtered)
        y[m] = tempered_block(z, wide, how.temperature[m], how, scaled[m]);
      const bool rises = softmax_block(how.filtered ? y[m] : z, wide, how.softmax, running[m]);
      if (rises && how.draw[m] == GREEDY) greedy_block(z, running[m].top, first, best[m]);
    }
    if (shared) {
      Best* both[2] = {&best[0], &best[1]};
      noisy_block<2>(y, both, first, wide, counter[0]);
      continue;
    }
    for (int m = 0; m < 2; ++m) {
      Best* one[1] = {&best[m]};
      if (noise[m]) noisy_block<1>(y + m, one, first, wide, counter[m]);
    }
  }
  for (int m = 0; m < 2; ++m) {
    float total = how.softmax ? running[m].total.result() : running[m].top > -INFINITY ? 1.0f : 0.0f;
    if (running[m].undefined) total = NAN;
    out[m] = {running[m].top, total, best[m].value, best[m].token};
  }
}

// ------------------------------------------------------------------------------- divergence

// Columns above `rival`.
SWITCHKD_INLINE int count_above(const float* z, int count, float rival) {
  int above = 0;
  for (int i = 0; i < count; i += LANES) above += __builtin_popcount(lanes_of(load(z + i) > Vec(rival)));
  return above;
}

SWITCHKD_INLINE void add_kl(const float* teacher, const float* student, int count,
                            const Shift& shift, Sum& total) {
  for (int i = 0; i < count; i += GROUP) {
    const Entry<Quad> x = compare(load_quad(teacher + i), load_quad(student + i), shift);
    total.add(sum_of(kl_teacher_student(x) * x.larger));
  }
}

// In nats, or the number of the teacher's logits above `rival`.
float measure(const Pair& pair, const Scan models[2], Metric metric, float rival, int64_t row,
              int64_t start, int64_t end) {
  float buffers[2][BLOCK];
  const Shift shift = shift_of(models);
  const JsdRows rows(models);
  const bool as_halves = metric == JSD_NATS && in_halves(pair);
  Sum total;
  int64_t above = 0;
  for (int64_t first = last_block(start, end); first >= start; first -= BLOCK) {
    const int count = static_cast<int>(end - first < BLOCK ? end - first : BLOCK);
    const int wide = padded(count);
    if (as_halves && count == BLOCK) {
      add_jsd(rows, halves(pair.model[0], row, first), halves(pair.model[1], row, first), count, total);
      continue;
    }
    const float* teacher = load_logits(pair, 0, row, first, count, buffers[0]);
    if (metric == RANK) {
      above += count_above(teacher, wide, rival);
      continue;
    }
    const float* student = load_logits(pair, 1, row, first, count, buffers[1]);
    if (metric == KL) add_kl(teacher, student, wide, shift, total);
    else add_jsd(rows, teacher, student, wide, total);
  }
  return metric == RANK ? static_cast<float>(above) : total.positive();
}

float logit(const Pair& pair, int model, int64_t row, int64_t token) {
  float buffer[BLOCK];
  return load_logits(pair, model, row, token, 1, buffer)[0];
}

// ------------------------------------------------------------------------------- filters

// Bits of a float to an integer of the same order; the same step leads back.
inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }
inline float of_order(int32_t order) { return as_float(static_cast<uint32_t>(ordered(order))); }

// How many logits are at least `pivot`.
inline int64_t count_from(const Pair& pair, int64_t row, float pivot) {
  float buffer[BLOCK];
  int64_t found = 0;
  for (int64_t first = 0; first < pair.vocab; first += BLOCK) {
    const int count = static_cast<int>(pair.vocab - first < BLOCK ? pair.vocab - first : BLOCK);
    const float* z = load_logits(pair, 1, row, first, count, buffer);
    int below = 0;
    for (int i = 0; i < padded(count); i += LANES)
      below += __builtin_popcount(lanes_of(load(z + i) < Vec(pivot)));
    found += padded(count) - below;
    if (pivot == -INFINITY) found -= padded(count) - count;
  }
  return found;
}

// The logit of rank k < V, exactly, by bisection on its bits in order.
inline float kth_largest(const Pair& pair, int64_t row, int64_t k) {
  int32_t low = -0x7F800001, high = 0x7F800000;  // -inf and +inf
  while (low < high) {
    int32_t middle = (low | high) - ((low ^ high) >> 1);  // the mean, rounded up
    if (count_from(pair, row, of_order(middle)) >= k) low = middle;
    else high = middle - 1;
  }
  return of_order(low);
}

// Sum of e^(z / T - top) over z / T > value.
inline float mass_above(const Pair& pair, int64_t row, float temperature, float value, float top) {
  float buffer[BLOCK];
  Vec total = Vec(0.0f);
  for (int64_t first = 0; first < pair.vocab; first += BLOCK) {
    const int count = static_cast<int>(pair.vocab - first < BLOCK ? pair.vocab - first : BLOCK);
    const float* z = load_logits(pair, 1, row, first, count, buffer);
    for (int i = 0; i < padded(count); i += LANES) {
      Vec y = load(z + i) / Vec(temperature);
      total = total + select(y > Vec(value), exp(y - top), Vec(0.0f));
    }
  }
  return sum(total);
}

// The student's token after top-k, top-p and min-p, -1 for a row that defines none. Draws from a
// superset and, as long as the winner is refused, again from what lies strictly above it: whatever
// is kept begins at some value (sample.py).
int64_t filtered_token(const Pair& pair, Sampling how, const Filter& filter, int64_t row) {
  const float temperature = how.temperature[1];
  how.filtered = true;
  how.softmax = true;
  how.floor = how.below = -INFINITY;
  if (filter.top_k > 0) how.floor = kth_largest(pair, row, filter.top_k) / temperature;
  float limit = -1.0f;
  for (;;) {
    Scan found[2];
    scan(pair, how, row, 0, pair.vocab, found);
    const Scan& one = found[1];
    if (!is_distribution(one.total)) return -1;
    if (limit < 0.0f) limit = filter.top_p * one.total;  // the first draw's: all that top-k leaves
    float value = logit(pair, 1, row, one.token) / temperature;
    how.floor = max(how.floor, one.top + filter.log_min_p);
    bool refused = value < how.floor;
    if (!refused && filter.top_p < 1.0f)
      refused = mass_above(pair, row, temperature, value, one.top) >= limit;
    if (!refused) return one.token;
    how.below = value;
  }
}

}  // namespace SWITCHKD_CAPABILITY
}  // namespace switchkd
