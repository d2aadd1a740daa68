// Losses of two rows and their gradient in the student's logits.
#pragma once

#include "row.h"

namespace switchkd {
inline namespace SWITCHKD_CAPABILITY {

template <int KIND, bool HEAVY>
struct Form {
  static constexpr int kind = KIND;
  static SWITCHKD_INLINE Term<Quad> terms(const Entry<Quad>& x, const Loss& loss) {
    return divergence_terms<KIND, HEAVY>(x, loss.weight, loss.detach);
  }
};

// Calls `with` with the kind of loss, and on which side of 1/2 its weight is, as constants.
template <class Call>
SWITCHKD_INLINE void for_form(const Loss& loss, Call with) {
  const bool heavy = loss.weight > 0.5f;
  switch (loss.kind) {
#define SWITCHKD_CASE(KIND) \
  case KIND:                \
    return with(Form<KIND, false>())
#define SWITCHKD_MIXTURE(KIND) \
  case KIND:                   \
    return heavy ? with(Form<KIND, true>()) : with(Form<KIND, false>())
    SWITCHKD_CASE(KL_TEACHER_STUDENT);
    SWITCHKD_CASE(KL_STUDENT_TEACHER);
    SWITCHKD_MIXTURE(GENERALIZED_JSD);
    SWITCHKD_MIXTURE(SKEW_KL);
    SWITCHKD_MIXTURE(SKEW_REVERSE_KL);
    SWITCHKD_CASE(TVD);
    SWITCHKD_CASE(JSD);
    SWITCHKD_CASE(CROSS_ENTROPY);
#undef SWITCHKD_CASE
#undef SWITCHKD_MIXTURE
  }
}

// What compares two rows. Where one has an offset that the other lacks, q = p e^d would have the
// rounding of so large a d: such rows are compared from their maxima, and others from 0.
struct Comparison {
  Shift shift;
  float start[2];
};

// Without a teacher the student stands for it.
SWITCHKD_INLINE Comparison comparison_of(const Pair& pair, const Scan models[2]) {
  const Scan &student = models[1], &teacher = pair.model[0].data == nullptr ? student : models[0];
  const float start[2] = {teacher.top, student.top};
  const bool far = abs(student.top - teacher.top) > 16.0f;
  const float t = far ? start[0] : 0.0f, s = far ? start[1] : 0.0f;
  return {shift_of({teacher.top - t, teacher.total}, {student.top - s, student.total}), {t, s}};
}

// A block of both models' logits, less where their comparison starts.
struct PairBlock {
  const float *teacher, *student;
  const float* logits;  // the student's
  int count, wide;
};

struct PairBuffers {
  float model[2][BLOCK], from_start[2][BLOCK];
};

SWITCHKD_INLINE const float* less(float start, const float* z, int wide, float* buffer) {
  if (start == 0.0f) return z;
  for (int i = 0; i < wide; i += LANES) store(buffer + i, load(z + i) - start);
  return buffer;
}

SWITCHKD_INLINE PairBlock load_pair(const Pair& pair, const Comparison& by, int64_t row,
                                    int64_t first, int64_t end, PairBuffers& buffers) {
  const int count = static_cast<int>(end - first < BLOCK ? end - first : BLOCK);
  const int wide = padded(count);
  const float* logits = load_logits(pair, 1, row, first, count, buffers.model[1]);
  const float* teacher = logits;
  if (pair.model[0].data != nullptr)
    teacher = load_logits(pair, 0, row, first, count, buffers.model[0]);
  return {less(by.start[0], teacher, wide, buffers.from_start[0]),
          less(by.start[1], logits, wide, buffers.from_start[1]), logits, count, wide};
}

SWITCHKD_INLINE Entry<Quad> compare(const PairBlock& z, int i, const Shift& by) {
  return compare(load_quad(z.teacher + i), load_quad(z.student + i), by);
}

// The loss, and sum u, which the gradient takes off.
Totals totals(const Pair& pair, const Scan models[2], const Loss& loss, bool needs_u, float* slopes,
              int64_t row, int64_t start, int64_t end) {
  const Comparison by = comparison_of(pair, models);
  Sum value, u;
  for_form(loss, [&](auto form) {
    PairBuffers buffers;
    float rest[BLOCK];
    for (int64_t first = last_block(start, end); first >= start; first -= BLOCK) {
      const PairBlock z = load_pair(pair, by, row, first, end, buffers);
      float* kept = slopes != nullptr && z.count == BLOCK ? slopes + first : rest;
      if (slopes != nullptr)  // the next block's place
        for (int i = 0; i < BLOCK; i += 16) __builtin_prefetch(slopes + first - BLOCK + i, 1);
      // u shares its logarithms with the value of every kind but one. The same code with a gradient
      // to come and without also gives the same value to the last bit.
      for (int i = 0; i < z.wide; i += GROUP) {
        const Entry<Quad> x = compare(z, i, by.shift);
        const Term<Quad> term = form.terms(x, loss);
        value.add(sum_of(term.value * x.larger));
        if (!needs_u && form.kind == JSD) continue;
        u.add(sum_of(u_of<form.kind>(term) * x.larger));
        store(kept + i, form.kind == KL_TEACHER_STUDENT ? term.slope * x.larger : term.slope);
      }
      if (slopes != nullptr && kept == rest)
        std::memcpy(slopes + first, rest, z.count * sizeof(float));
    }
  });
  return {value.positive(), u.result()};
}

void unit_gradient(const Pair& pair, const Scan& student, const Loss& loss, float total,
                   float* slopes, int64_t row, int64_t start, int64_t end) {
  const float inverse = 1.0f / student.total;
  float buffer[BLOCK], rest[BLOCK];
  for (int64_t first = start; first < end; first += BLOCK) {
    const int count = static_cast<int>(end - first < BLOCK ? end - first : BLOCK);
    const float* z = load_logits(pair, 1, row, first, count, buffer);
    float* grads = count == BLOCK ? slopes + first : rest;
    if (grads == rest) std::memcpy(rest, slopes + first, count * sizeof(float));
    for (int i = 0; i < padded(count); i += 2 * LANES) {
      const Twin below = student.top - load_twin(z + i), slope = load_twin(grads + i);
      const Power<Twin> e = power(-min(below, Twin(87.0f)));
      const Twin some = (e.scale * (e.r + e.bend) + e.scale) * inverse;
      const Twin q = select(below < Twin(87.0f), some, Twin(0.0f));  // of -inf nothing
      store(grads + i, loss.kind == KL_TEACHER_STUDENT ? slope - q * total : q * (slope - total));
    }
    if (grads == rest) std::memcpy(slopes + first, rest, count * sizeof(float));
  }
}

void gradient(const Pair& pair, const Scan models[2], const Loss& loss, const Upstream& upstream,
              const Logits& out, int64_t row, int64_t start, int64_t end) {
  const Comparison by = comparison_of(pair, models);
  const float of_q = upstream.ce_weight - upstream.total;
  for_form(loss, [&](auto form) {
    PairBuffers buffers;
    float rest[BLOCK];
    for (int64_t first = start; first < end; first += BLOCK) {
      const PairBlock z = load_pair(pair, by, row, first, end, buffers);
      const bool in_place = !out.bfloat16 && z.count == BLOCK;
      float* grads = in_place ? static_cast<float*>(out.data) + row * out.stride + first : rest;
      for (int i = 0; i < z.wide; i += GROUP) {
        const Entry<Quad> x = compare(z, i, by.shift);
        Term<Quad> term = form.terms(x, loss);
        term.q = select(load_quad(z.student + i) > Quad(-INFINITY), term.q, Quad(0.0f));
        store(grads + i, (term.q * of_q + u_of<form.kind>(term)) * (x.larger * upstream.scale));
      }
      const int64_t label = upstream.label - first;
      if (label >= 0 && label < z.count) grads[label] -= upstream.scale * upstream.ce_weight;
      if (pair.cap != 0.0f) {
        for (int i = 0; i < z.wide; i += LANES) {
          Vec slope = load(z.logits + i) / Vec(pair.cap);
          store(grads + i, load(grads + i) * (Vec(1.0f) - slope * slope));
        }
      }
      if (pair.scale != 1.0f)
        for (int i = 0; i < z.wide; i += LANES) store(grads + i, load(grads + i) * pair.scale);
      if (!in_place) store_block(out, row, first, z.count, grads);
    }
  });
}

}  // namespace SWITCHKD_CAPABILITY
}  // namespace switchkd
