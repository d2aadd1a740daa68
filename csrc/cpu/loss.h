// Losses of two rows and their gradient in the student's logits.
#pragma once

#include "row.h"

namespace switchkd {
inline namespace SWITCHKD_CAPABILITY {

template <int KIND>
struct KindIs {
  static constexpr int value = KIND;
};

// Calls `with` with the kind as a constant.
template <class Call>
SWITCHKD_INLINE void for_kind(int kind, Call with) {
  switch (kind) {
#define SWITCHKD_CASE(KIND) \
  case KIND:                \
    return with(KindIs<KIND>())
    SWITCHKD_CASE(KL_TEACHER_STUDENT);
    SWITCHKD_CASE(KL_STUDENT_TEACHER);
    SWITCHKD_CASE(GENERALIZED_JSD);
    SWITCHKD_CASE(SKEW_KL);
    SWITCHKD_CASE(SKEW_REVERSE_KL);
    SWITCHKD_CASE(TVD);
    SWITCHKD_CASE(JSD);
    SWITCHKD_CASE(CROSS_ENTROPY);
#undef SWITCHKD_CASE
  }
}

// A block of both models' logits. Without a teacher the student stands for it.
struct PairBlock {
  const float* teacher;
  const float* student;
  int count, wide;
};

SWITCHKD_INLINE PairBlock load_pair(
    const Pair& pair, int64_t row, int64_t first, int64_t end, float buffers[2][BLOCK]) {
  const int count = static_cast<int>(end - first < BLOCK ? end - first : BLOCK);
  const float* student = load_logits(pair, 1, row, first, count, buffers[1]);
  const float* teacher = student;
  if (pair.model[0].data != nullptr)
    teacher = load_logits(pair, 0, row, first, count, buffers[0]);
  return {teacher, student, count, padded(count)};
}

SWITCHKD_INLINE Shift loss_shift(const Pair& pair, const Scan models[2]) {
  const Scan& teacher = models[pair.model[0].data == nullptr ? 1 : 0];
  return shift_of({teacher.top, teacher.total}, {models[1].top, models[1].total});
}

// The loss, and sum u, which the gradient takes off.
Totals totals(const Pair& pair, const Scan models[2], const Loss& loss, bool needs_u, int64_t row,
              int64_t start, int64_t end) {
  const Shift shift = loss_shift(pair, models);
  Sum value, u;
  for_kind(loss.kind, [&](auto kind) {
    float buffers[2][BLOCK];
    for (int64_t first = start; first < end; first += BLOCK) {
      const PairBlock z = load_pair(pair, row, first, end, buffers);
      // u shares its logarithms with the value of every kind but one. The same code with a gradient
      // to come and without also gives the same value to the last bit.
      if (needs_u || kind.value != JSD) {
        for (int i = 0; i < z.wide; i += LANES) {
          Entry<Vec> x = compare(load(z.teacher + i), load(z.student + i), shift);
          Term<Vec> term = divergence_terms<kind.value>(x, loss.weight, loss.detach);
          value.add(term.value);
          u.add(term.u);
        }
      } else {
        for (int i = 0; i < z.wide; i += LANES) {
          Entry<Vec> x = compare(load(z.teacher + i), load(z.student + i), shift);
          value.add(divergence_terms<kind.value>(x, loss.weight, loss.detach).value);
        }
      }
    }
  });
  return {value.result(), sum(u.total)};
}

void gradient(const Pair& pair, const Scan models[2], const Loss& loss, const Upstream& upstream,
              const Logits& out, int64_t row, int64_t start, int64_t end) {
  const Shift shift = loss_shift(pair, models);
  for_kind(loss.kind, [&](auto kind) {
    float buffers[2][BLOCK], grads[BLOCK];
    for (int64_t first = start; first < end; first += BLOCK) {
      const PairBlock z = load_pair(pair, row, first, end, buffers);
      for (int i = 0; i < z.wide; i += LANES) {
        Entry<Vec> x = compare(load(z.teacher + i), load(z.student + i), shift);
        Vec u = divergence_terms<kind.value>(x, loss.weight, loss.detach).u;
        store(grads + i, (u - x.q * upstream.total) * upstream.scale + x.q * upstream.ce_weight);
      }
      const int64_t label = upstream.label - first;
      if (label >= 0 && label < z.count) grads[label] -= upstream.ce_weight;
      if (pair.cap != 0.0f) {
        for (int i = 0; i < z.wide; i += LANES) {
          Vec slope = load(z.student + i) / Vec(pair.cap);
          store(grads + i, load(grads + i) * (Vec(1.0f) - slope * slope));
        }
      }
      if (pair.scale != 1.0f)
        for (int i = 0; i < z.wide; i += LANES) store(grads + i, load(grads + i) * pair.scale);
      store_block(out, row, first, z.count, grads);
    }
  });
}

}  // namespace SWITCHKD_CAPABILITY
}  // namespace switchkd
