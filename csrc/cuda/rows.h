// A pair of rows: softmax and token of either, then what divides them, from tiles in shared memory.
#pragma once

#include "tiles.h"

namespace switchkd {
namespace cuda {

// Of one model, all or a part of a row. `total` is NaN for a NaN or +inf, 0 if all are -inf.
struct Scan {
  float top, total;  // maximum and sum of e^(z - top)
  float best;        // largest perturbed logit
  int token;         // its token
};
struct alignas(16) Scans {
  Scan model[2];
};

constexpr float LOWEST = -3.402823466e38f;  // not -inf: it is taken from -inf
constexpr Scan NOTHING = {LOWEST, 0.0f, -INFINITY, 0};

SWITCHKD_DEVICE Scan join(const Scan& a, const Scan& b) {
  const float top = max(a.top, b.top);
  const bool second = b.best > a.best || (b.best == a.best && b.token < a.token);
  return {top, a.total * exp(a.top - top) + b.total * exp(b.top - top),
          second ? b.best : a.best, second ? b.token : a.token};
}

// Both models' whole row.
struct Verdict {
  Softmax softmax[2];
  int token[2];
  Shift shift;
  float rival;  // the teacher's logit of the student's token
  bool valid;
};

// Shared memory of a block, before its tiles.
struct Shared {
  Barrier ready[MAX_TILES];
  Scans warp_scans[WARPS], parts[MAX_CLUSTER];
  float warp_sums[WARPS], sums[MAX_CLUSTER];
  int best[2];  // the block's largest perturbed logits so far, in order as integers
  bool last;
  Verdict verdict;
};
static_assert(sizeof(Shared) <= HEADER_BYTES && HEADER_BYTES % 16 == 0, "");

SWITCHKD_DEVICE Shared& shared_of_block() { return *reinterpret_cast<Shared*>(block_memory()); }

// ------------------------------------------------------------------------------- reductions

SWITCHKD_DEVICE float join(float a, float b) { return a + b; }
SWITCHKD_DEVICE Scans join(const Scans& a, const Scans& b) {
  return {{join(a.model[0], b.model[0]), join(a.model[1], b.model[1])}};
}

template <class Value>
SWITCHKD_DEVICE Value warp_join(Value x) {
  SWITCHKD_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x = join(x, shuffle_xor(x, mask));
  return x;
}

// What the threads of a block have, joined, in the first warp; `warps` has room for each warp's.
template <class Value>
SWITCHKD_DEVICE Value block_join(Value x, const Value& nothing, Value* warps) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  x = warp_join(x);
  if (lane == 0) warps[warp] = x;
  block_sync();
  return warp == 0 ? warp_join(lane < WARPS ? warps[lane] : nothing) : x;
}

// ------------------------------------------------------------------------------- first sweep

// A float to an integer of the same order; the same step leads back.
SWITCHKD_DEVICE int ordered(int bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }

// A perturbed logit below this is none of the row's largest. Bounds of a perturbed logit err by
// roundings of z / T, up to 2^-22 of it.
SWITCHKD_DEVICE float cut_of(float best) { return best - abs(best) * 1e-6f; }

// Draws of both models by one thread.
struct Draws {
  Counter counter[2];
  float cut[2];
  bool shared;  // one field for both

  SWITCHKD_DEVICE Draws(const Selection& how, int64_t row) {
    const int64_t id = how.id.data[row * how.id.stride];
    const int64_t position = how.position.data[row * how.position.stride];
    SWITCHKD_UNROLL
    for (int m = 0; m < 2; ++m) {
      counter[m] = counter_of(how.seed, position, id, how.model[m].stream);
      cut[m] = -INFINITY;
    }
    shared = how.model[0].stream == how.model[1].stream;
  }

  // Takes the quad's largest perturbed logit, if it may be the row's: Philox runs only where the
  // largest noise could win, logarithms only where a bound by the least word could. Says whether
  // they ran.
  SWITCHKD_DEVICE bool add(const Selection& how, const float z[2][QUAD], const float top[2],
                           int token, Scans& mine) {
    uint32_t word[QUAD];
    bool drawn = false, tried = false;
    SWITCHKD_UNROLL
    for (int m = 1; m >= 0; --m) {
      const Model& model = how.model[m];
      if (model.draw != NOISE || !(top[m] * model.inverse + GUMBEL_MAX >= cut[m])) continue;
      if (!drawn || !shared) {
        const Counter& c = counter[m];
        const Words<uint64_t> w = philox(
            c.seed, Words<uint64_t>{static_cast<uint64_t>(token / QUAD), c.position, c.low, c.high});
        word[0] = static_cast<uint32_t>(w.w0);
        word[1] = static_cast<uint32_t>(w.w1);
        word[2] = static_cast<uint32_t>(w.w2);
        word[3] = static_cast<uint32_t>(w.w3);
        drawn = true;
      }
      const uint32_t low = word[0] < word[1] ? word[0] : word[1];
      const uint32_t high = word[2] < word[3] ? word[2] : word[3];
      const uint32_t least = low < high ? low : high;
      const float bits = static_cast<float>(as_bits(static_cast<float>(least >> 1)));
      if (!(top[m] * model.inverse + (GUMBEL_AT - GUMBEL_PER_BIT * bits) >= cut[m])) continue;
      Scan& best = mine.model[m];
      SWITCHKD_UNROLL
      for (int i = 0; i < QUAD; ++i) {
        const float y = z[m][i] / model.temperature + gumbel(word[i]);
        if (y > best.best) best.best = y, best.token = token + i;  // the first of equal values
      }
      tried = true;
    }
    return tried;
  }

  // What the block has found so far, by a whole warp that has looked.
  SWITCHKD_DEVICE void agree(const Scans& mine, int best[2]) {
    SWITCHKD_UNROLL
    for (int m = 0; m < 2; ++m) {
      int most = warp_max(ordered(static_cast<int>(as_bits(mine.model[m].best))));
      if (thread_index() % 32 == 0) {
        const int found = atomic_max(best + m, most);
        most = found > most ? found : most;
      }
      cut[m] = cut_of(as_float(static_cast<uint32_t>(ordered(first_lane(most)))));
    }
  }
};

template <int T, int S>
SWITCHKD_DEVICE void scan_tile(const Selection& how, const Tiles& tiles, int tile, int slot,
                               Draws& draws, int best[2], Scans& mine) {
  const View<T> teacher = tiles.view<T>(0, slot);
  const View<S> student = tiles.view<S>(1, slot);
  const int quads = tiles.quads(tile), lane = thread_index() % 32;
  for (int start = thread_index() - lane; start < quads; start += THREADS) {  // whole warps
    const int quad = start + lane, token = static_cast<int>(tiles.first(tile)) + quad * QUAD;
    float z[2][QUAD], top[2];
    SWITCHKD_UNROLL
    for (int i = 0; i < QUAD; ++i) z[0][i] = z[1][i] = -INFINITY;
    if (quad < quads) {
      teacher.load(quad, z[0]);
      student.load(quad, z[1]);
    }
    SWITCHKD_UNROLL
    for (int m = 0; m < 2; ++m) {
      Scan& scan = mine.model[m];
      top[m] = max(max(z[m][0], z[m][1]), max(z[m][2], z[m][3]));
      const float next = max(scan.top, top[m]);
      scan.total = scan.total * exp(scan.top - next) +
                   ((exp(z[m][0] - next) + exp(z[m][1] - next)) +
                    (exp(z[m][2] - next) + exp(z[m][3] - next)));
      scan.top = next;
      if (how.model[m].draw != GREEDY || !(top[m] > scan.best)) continue;
      SWITCHKD_UNROLL
      for (int i = QUAD - 1; i >= 0; --i)
        if (z[m][i] == top[m]) scan.token = token + i;
      scan.best = top[m];
    }
    if (any_lane(draws.add(how, z, top, token, mine))) draws.agree(mine, best);
  }
}

// ------------------------------------------------------------------------------- second sweep

// The row from its parts, by the first warp, for all; a known token out of range flags the row.
SWITCHKD_DEVICE void judge(const Selection& how, int64_t row, const Scans* parts, int count,
                           Verdict& verdict) {
  Scans all = {{NOTHING, NOTHING}};
  for (int i = thread_index(); i < count; i += 32) all = join(all, parts[i]);
  all = warp_join(all);
  if (thread_index() != 0) return;
  verdict.valid = true;
  SWITCHKD_UNROLL
  for (int m = 0; m < 2; ++m) {
    const Model& model = how.model[m];
    const Scan& scan = all.model[m];
    int64_t token = scan.token;
    if (model.draw == KNOWN) token = model.known.data[row * model.known.stride];
    verdict.valid &= is_distribution(scan.total) && token >= 0 && token < how.vocab;
    verdict.token[m] = static_cast<int>(token);
    verdict.softmax[m] = {scan.top, scan.total};
  }
  verdict.shift = shift_of(verdict.softmax[0], verdict.softmax[1]);
  const Model& teacher = how.model[0];
  if (how.metric == RANK && verdict.valid)
    verdict.rival =
        load_logit(teacher.logits, row * teacher.stride + verdict.token[1], teacher.dtype);
}

template <int METRIC, int T, int S>
SWITCHKD_DEVICE float measure_tile(const Tiles& tiles, int tile, int slot, const Verdict& verdict) {
  const View<T> teacher = tiles.view<T>(0, slot);
  const View<S> student = tiles.view<S>(1, slot);
  const int quads = tiles.quads(tile);
  float sum = 0.0f;
  for (int quad = thread_index(); quad < quads; quad += THREADS) {
    float z[2][QUAD];
    teacher.load(quad, z[0]);
    student.load(quad, z[1]);
    SWITCHKD_UNROLL
    for (int i = 0; i < QUAD; ++i) {
      if (METRIC == RANK) {
        sum += z[0][i] > verdict.rival ? 1.0f : 0.0f;
      } else if (METRIC == KL) {
        const Entry<float> x = compare(z[0][i], z[1][i], verdict.shift);
        sum += kl_teacher_student(x) * x.larger;
      } else {
        const float d = log_ratio(z[0][i], z[1][i], verdict.shift);
        sum += jsd_factor(d) * larger(z[0][i], z[1][i], verdict.shift);
      }
    }
  }
  return sum;
}

// The thread's share of a divergence; each(body) calls body(tile, slot) for its block's tiles.
template <int T, int S, class Each>
SWITCHKD_DEVICE float measure(const Selection& how, const Tiles& tiles, const Shared& shared,
                              Each each) {
  const Verdict verdict = shared.verdict;
  float sum = 0.0f;
  if (!verdict.valid) return sum;
  each([&](int tile, int slot) {
    if (how.metric == RANK) sum += measure_tile<RANK, T, S>(tiles, tile, slot, verdict);
    else if (how.metric == KL) sum += measure_tile<KL, T, S>(tiles, tile, slot, verdict);
    else sum += measure_tile<JSD_NATS, T, S>(tiles, tile, slot, verdict);
  });
  return how.metric == JSD_NATS ? sum * (0.5f / JSD_SCALE * verdict.shift.teacher_inverse) : sum;
}

// Who writes, and what, from the sum of all terms. By one thread.
SWITCHKD_DEVICE void decide(const Selection& how, int64_t row, const Verdict& verdict, float sum) {
  if (!verdict.valid) {
    how.token[row] = -1;
    how.writer[row] = false;
    SWITCHKD_UNROLL
    for (int i = 0; i < 3; ++i) how.value[i * how.rows + row] = NAN;
    return;
  }
  float divergence = sum;
  if (how.metric == KL) divergence = min(sum, 50.0f);
  if (how.metric == JSD_NATS) {  // rounding does not lift disjoint rows over one bit
    divergence = min(sum, LN2);
    if (how.bits) divergence = min(divergence * 1.4426950408889634f, 1.0f);
  }
  const bool from_teacher = divergence > how.threshold.data[row * how.threshold.stride];
  const int token = verdict.token[from_teacher ? 0 : 1];
  how.token[row] = token;
  how.writer[row] = from_teacher;
  how.value[row] = divergence;
  SWITCHKD_UNROLL
  for (int m = 0; m < 2; ++m) {
    const Model& model = how.model[m];
    const float z = load_logit(model.logits, row * model.stride + token, model.dtype);
    const Softmax& softmax = verdict.softmax[m];
    how.value[(1 + m) * how.rows + row] = (z - softmax.top) - log(softmax.total);
  }
}

}  // namespace cuda
}  // namespace switchkd
