// The losses of two rows of logits, and of products of heads.
#pragma once

#include <ATen/ops/empty.h>

#include <cstring>
#include <tuple>

#include "arguments.h"
#include "dispatch.h"
#include "sweep.h"

namespace switchkd {
namespace {

float loss_value(const Loss& loss, const Totals* parts, int64_t slices) {
  float value = 0.0f;
  for (int64_t i = 0; i < slices; ++i) value += parts[i].value;
  return loss.kind == JSD ? std::min(value, LN2) : value;
}

float sum_u(const Totals* parts, int64_t slices) {
  float u = 0.0f;
  for (int64_t i = 0; i < slices; ++i) u += parts[i].u;
  return u;
}

// (M,) nats; (5, M) for backward: maximum and sum of the teacher's and student's softmax, sum u; and
// where asked for (M, V) floats, the gradient of each loss in its logits, made of a row while it is in
// the cache. Masked rows are 0, undefined ones NaN.
std::tuple<Tensor, Tensor, Tensor> divergence(
    const Tensor& teacher, const Tensor& student, const optional<Tensor>& mask, int64_t kind,
    double weight, bool detach, int64_t vocab, bool needs_grad, bool needs_unit) {
  const Pair pair = pair_of(teacher, student, vocab);
  const int64_t rows = student.size(0), width = student.size(1);
  const Loss form = loss_of(kind, weight, detach);
  const auto kept = mask ? per_row<bool>("mask", *mask, rows) : PerRow<bool>{};
  Tensor loss = at::empty({rows}, student.options().dtype(at::kFloat));
  Tensor saved = at::empty({5, rows}, loss.options());
  Tensor unit = at::empty({needs_unit ? rows : 0, width}, loss.options());
  auto unit_of = [&, data = unit.data_ptr<float>()](int64_t row) {
    return needs_unit ? data + row * width : nullptr;
  };
  float* losses = loss.data_ptr<float>();
  float* save = saved.data_ptr<float>();
  const Kernels& run = *current.load();
  auto counts = [&](int64_t row) { return kept.data == nullptr || kept[row]; };
  sweep<Totals>(
      rows, vocab,
      [&](int64_t row, int64_t start, int64_t end, Scan* out) {
        out[0] = out[1] = {0.0f, 1.0f, 0.0f, 0};
        if (counts(row)) run.scan(pair, Sampling(), row, start, end, out);
      },
      [&](int64_t row, const Scan* scans, int64_t start, int64_t end) {
        if (!counts(row)) return Totals{0.0f, 0.0f};
        return run.totals(pair, scans, form, needs_grad, unit_of(row), row, start, end);
      },
      [&](int64_t row, const Scan* scans, const Totals* parts, int64_t slices) {
        const bool valid = is_distribution(scans[0].total) && is_distribution(scans[1].total);
        losses[row] = valid ? loss_value(form, parts, slices) : NAN;
        for (int m = 0; m < 2; ++m) {
          save[2 * m * rows + row] = scans[m].top;
          save[(2 * m + 1) * rows + row] = scans[m].total;
        }
        const float total = save[4 * rows + row] = sum_u(parts, slices);
        if (!needs_unit) return;
        float* grads = unit_of(row);
        const int64_t end = counts(row) ? vocab : 0;
        if (end > 0) run.unit_gradient(pair, scans[1], form, total, grads, row, 0, end);
        std::memset(grads + end, 0, (width - end) * sizeof(float));
      });
  return {loss, saved, unit};
}

// The gradient of the student's logits, contiguous, 0 in masked rows and beyond the vocabulary.
Tensor divergence_backward(
    const Tensor& upstream, const Tensor& teacher, const Tensor& student,
    const optional<Tensor>& mask, const Tensor& saved, int64_t kind, double weight, bool detach,
    int64_t vocab) {
  const Pair pair = pair_of(teacher, student, vocab);
  const int64_t rows = student.size(0), width = student.size(1);
  const Loss form = loss_of(kind, weight, detach);
  const auto kept = mask ? per_row<bool>("mask", *mask, rows) : PerRow<bool>{};
  const auto scale = per_row<float>("upstream", upstream, rows);
  TORCH_CHECK(saved.sizes() == at::IntArrayRef({5, rows}) && saved.is_contiguous(),
              "saved must be contiguous (5, ", rows, "), got ", saved.sizes());
  const float* save = saved.const_data_ptr<float>();
  Tensor grad = at::empty({rows, width}, student.options());
  const Logits out{grad.data_ptr(), width, pair.model[1].bfloat16};
  const int64_t entry = out.bfloat16 ? 2 : 4;
  const Kernels& run = *current.load();
  const int64_t slices = (vocab + 64 * SLICE - 1) / (64 * SLICE), size = 64 * SLICE;
  const int64_t grain = std::max<int64_t>(1, size / vocab);
  at::parallel_for(0, rows * slices, grain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t row = i / slices, start = i % slices * size;
      const int64_t end = std::min(start + size, vocab);
      char* at_row = static_cast<char*>(out.data) + row * width * entry;
      if (end == vocab) std::memset(at_row + vocab * entry, 0, (width - vocab) * entry);
      if (kept.data != nullptr && !kept[row]) {
        std::memset(at_row + start * entry, 0, (end - start) * entry);
        continue;
      }
      Scan scans[2] = {};
      for (int m = 0; m < 2; ++m) {
        scans[m].top = save[2 * m * rows + row];
        scans[m].total = save[(2 * m + 1) * rows + row];
      }
      const Upstream upstream{scale[row], save[4 * rows + row], 0.0f, -1};
      run.gradient(pair, scans, form, upstream, out, row, start, end);
    }
  });
  return grad;
}

// (n,) losses of products of heads; `student` becomes its gradient. See Pair in cpu/kernels.h.
Tensor head_chunk(
    const optional<Tensor>& teacher, const Tensor& student, const optional<Tensor>& teacher_bias,
    const optional<Tensor>& student_bias, const optional<Tensor>& labels, int64_t kind,
    double weight, bool detach, int64_t vocab, double scale, double cap, double ce_weight,
    bool needs_grad) {
  Pair pair{{{nullptr, 0, false}, {}}, vocab};
  if (teacher) pair = pair_of(*teacher, student, vocab);
  pair.model[1] = logits_of("student products", student, vocab);
  pair.bias[0] = bias_of("teacher_bias", teacher_bias, vocab);
  pair.bias[1] = bias_of("student_bias", student_bias, vocab);
  pair.scale = static_cast<float>(scale);
  pair.cap = static_cast<float>(cap);
  const Loss form = loss_of(kind, weight, detach);
  TORCH_CHECK(teacher.has_value() != (kind == CROSS_ENTROPY), "a teacher goes with every kind but ",
              "cross-entropy, got kind ", kind);
  const int64_t rows = student.size(0);
  const auto label = labels ? per_row<int64_t>("labels", *labels, rows) : PerRow<int64_t>{};
  const float ce = static_cast<float>(ce_weight);
  for (int64_t row = 0; labels && row < rows; ++row)
    TORCH_CHECK(label[row] >= 0 && label[row] < vocab, "labels must be in [0, ", vocab, "), got ",
                label[row]);
  Tensor loss = at::empty({rows}, student.options().dtype(at::kFloat));
  float* losses = loss.data_ptr<float>();
  const Kernels& run = *current.load();
  auto valid = [&](const Scan* scans) {
    return is_distribution(scans[1].total) && (!teacher || is_distribution(scans[0].total));
  };
  sweep<Totals>(
      rows, vocab,
      [&](int64_t row, int64_t start, int64_t end, Scan* out) {
        run.scan(pair, Sampling(), row, start, end, out);
      },
      [&](int64_t row, const Scan* scans, int64_t start, int64_t end) {
        if (kind == CROSS_ENTROPY) return Totals{0.0f, 0.0f};
        return run.totals(pair, scans, form, needs_grad, nullptr, row, start, end);
      },
      [&](int64_t row, const Scan* scans, const Totals* parts, int64_t slices) {
        losses[row] = valid(scans) ? loss_value(form, parts, slices) : NAN;
        if (labels) {
          const float z = run.logit(pair, 1, row, label[row]);
          losses[row] -= ce * ((z - scans[1].top) - std::log(scans[1].total));
        }
        if (!needs_grad || !valid(scans)) return;
        const Upstream upstream{1.0f, sum_u(parts, slices), labels ? ce : 0.0f,
                                labels ? label[row] : -1};
        run.gradient(pair, scans, form, upstream, pair.model[1], row, 0, vocab);
      });
  return loss;
}

}  // namespace
}  // namespace switchkd
