// The split of rows, and of few rows' columns, over threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "kernels.h"

namespace switchkd {
namespace {

// The row's, of its slices in order.
Scan combined(const Scan* slices, int64_t count, int64_t step) {
  Scan all = slices[0];
  for (int64_t i = 1; i < count; ++i) {
    const Scan& one = slices[i * step];
    all.top = one.top > all.top ? one.top : all.top;
    if (one.best > all.best) all.best = one.best, all.token = one.token;
  }
  all.total = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const Scan& one = slices[i * step];
    if (one.total != 0.0f)  // a slice of -inf has no maximum
      all.total += one.total * std::exp(one.top - all.top);
    if (std::isnan(one.total)) all.total = one.total;
  }
  return all;
}

// first(row, start, end, Scan[2]) over slices, then second(row, Scan[2] of the whole row, start,
// end) -> R over slices, then last(row, Scan[2], R[], slices). A thread does whole rows, so that
// the second sweep finds them in its cache, unless there are fewer rows than threads.
template <class R, class First, class Second, class Last>
void sweep(int64_t rows, int64_t vocab, First first, Second second, Last last) {
  constexpr int64_t WORTH_A_THREAD = 1 << 15;  // entries
  const int64_t threads = at::get_num_threads(), blocks = (vocab + SLICE - 1) / SLICE;
  int64_t slices = 1;
  if (rows < threads && rows > 0 && rows * vocab > 2 * WORTH_A_THREAD && !at::in_parallel_region())
    slices = std::min((threads + rows - 1) / rows, blocks);
  const int64_t size = (blocks + slices - 1) / slices * SLICE;
  slices = (vocab + size - 1) / size;
  if (slices == 1) {
    const int64_t grain = std::max<int64_t>(1, WORTH_A_THREAD / vocab);
    at::parallel_for(0, rows, grain, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) {
        Scan scans[2];
        first(row, 0, vocab, scans);
        const R result = second(row, scans, 0, vocab);
        last(row, scans, &result, 1);
      }
    });
    return;
  }
  std::vector<Scan> parts(2 * rows * slices), whole(2 * rows);
  std::vector<R> results(rows * slices);
  auto range = [&](int64_t slice) {
    return std::pair(slice * size, std::min((slice + 1) * size, vocab));
  };
  at::parallel_for(0, rows * slices, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const auto [start, end] = range(i % slices);
      first(i / slices, start, end, &parts[2 * i]);
    }
  });
  for (int64_t i = 0; i < 2 * rows; ++i)
    whole[i] = combined(&parts[i / 2 * slices * 2 + i % 2], slices, 2);
  at::parallel_for(0, rows * slices, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const auto [start, end] = range(i % slices);
      results[i] = second(i / slices, &whole[i / slices * 2], start, end);
    }
  });
  for (int64_t row = 0; row < rows; ++row)
    last(row, &whole[2 * row], &results[row * slices], slices);
}

}  // namespace
}  // namespace switchkd
