// The linear layer for few rows.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "arguments.h"
#include "dispatch.h"

namespace switchkd {
namespace {

Tensor linear(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias,
              bool transposed) {
  TORCH_CHECK(weight.dim() == 2, "weight must have two dimensions, got ", weight.sizes());
  const int64_t K = transposed ? weight.size(0) : weight.size(1);
  const int64_t N = transposed ? weight.size(1) : weight.size(0);
  TORCH_CHECK(x.dim() == 2 && x.size(1) == K, "x must be (rows, ", K, "), got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat,
              "x and weight must be float32, got ", x.scalar_type(), " and ", weight.scalar_type());
  TORCH_CHECK(x.stride(1) == 1 && weight.stride(1) == 1, "x and weight must have rows of stride 1, "
              "got ", x.stride(1), " and ", weight.stride(1));
  if (bias)
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == N && bias->is_contiguous() &&
                bias->scalar_type() == at::kFloat, "bias must be (", N, ",) float32, got ",
                bias->sizes(), " ", bias->scalar_type());
  Tensor y = at::empty({x.size(0), N}, x.options());
  const auto run = transposed ? current.load()->linear_transposed : current.load()->linear;
  constexpr int64_t BLOCK = 64;  // outputs: whole cache lines for each thread
  // A thread's part in one piece, and none for less work than it takes to wake a thread.
  const int64_t blocks = (N + BLOCK - 1) / BLOCK;
  const int64_t grain = std::max<int64_t>(1, 16384 / (BLOCK * std::max<int64_t>(K, 1)));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    run(x.const_data_ptr<float>(), x.stride(0), weight.const_data_ptr<float>(), weight.stride(0),
        bias ? bias->const_data_ptr<float>() : nullptr, y.mutable_data_ptr<float>(), N, x.size(0),
        K, begin * BLOCK, std::min(end * BLOCK, N));
  });
  return y;
}

}  // namespace
}  // namespace switchkd
