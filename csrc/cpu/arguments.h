// Tensors as the kernels take them, or an error that says what was got.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>
#include <optional>

#include "../rowwise.h"
#include "kernels.h"

namespace switchkd {
namespace {

using at::Tensor;
using std::optional;

Logits logits_of(const char* name, const Tensor& x, int64_t vocab) {
  TORCH_CHECK(x.device().is_cpu(), name, " must be on the CPU, got ", x.device());
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, name,
              " must be float32 or bfloat16, got ", x.scalar_type());
  TORCH_CHECK(x.dim() == 2, name, " must be (rows, vocabulary), got ", x.sizes());
  TORCH_CHECK(x.size(1) == 1 || x.stride(1) == 1, name, " must have rows with stride 1, got ",
              x.stride(1));
  constexpr int64_t most = std::numeric_limits<int32_t>::max() - SLICE;
  TORCH_CHECK(vocab >= 1 && vocab <= x.size(1) && vocab <= most,
              "vocab_size must be in [1, ", x.size(1), "] and below 2^31, got ", vocab);
  return {x.data_ptr(), x.stride(0), x.scalar_type() == at::kBFloat16};
}

template <class T>
struct PerRow {
  const T* data;
  int64_t stride;
  T operator[](int64_t row) const { return data[row * stride]; }
};

template <class T>
PerRow<T> per_row(const char* name, const Tensor& x, int64_t rows) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == c10::CppTypeToScalarType<T>::value, name,
              " must be ", c10::CppTypeToScalarType<T>::value, " on the CPU, got ", x.scalar_type(),
              " on ", x.device());
  TORCH_CHECK(x.dim() == 1 && x.size(0) == rows, name, " must be (", rows, "), got ", x.sizes());
  return {x.const_data_ptr<T>(), x.stride(0)};
}

const float* bias_of(const char* name, const optional<Tensor>& bias, int64_t vocab) {
  if (!bias) return nullptr;
  TORCH_CHECK(bias->device().is_cpu() && bias->scalar_type() == at::kFloat && bias->dim() == 1 &&
              bias->size(0) >= vocab && bias->is_contiguous(), name, " must be ", vocab,
              " contiguous float32 on the CPU, got ", bias->scalar_type(), " ", bias->sizes());
  return bias->const_data_ptr<float>();
}

Pair pair_of(const Tensor& teacher, const Tensor& student, int64_t vocab) {
  Pair pair{{logits_of("teacher logits", teacher, vocab),
             logits_of("student logits", student, vocab)}, vocab};
  TORCH_CHECK(teacher.size(0) == student.size(0),
              "teacher and student must have as many rows, got ", teacher.size(0), " and ",
              student.size(0));
  return pair;
}

Loss loss_of(int64_t kind, double weight, bool detach) {
  TORCH_CHECK(kind >= 0 && kind < KINDS, "kind must be in [0, ", KINDS, "), got ", kind);
  return {static_cast<int>(kind), static_cast<float>(weight), detach};
}

}  // namespace
}  // namespace switchkd
