// The split of rows into slices, and of rows or slices over threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
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

// Columns of a slice: by the width of a row alone, so that its sums, and what is decided by them, are
// the same in any batch and for any number of threads. A power of two of slices, so that as many
// threads have equal shares; no more of them, because each finds its maximum anew.
int64_t slice_size(int64_t vocab) {
  constexpr int64_t MOST = 1 << 16;  // columns
  int64_t slices = 1;
  while (slices * MOST < vocab) slices *= 2;
  return (vocab + slices * SLICE - 1) / (slices * SLICE) * SLICE;
}

// first(row, start, end, Scan[2]) over slices, then second(row, Scan[2] of the whole row, start,
// end) -> R over slices, then last(row, Scan[2], R[], slices). A thread does whole rows, so that
// the second sweep finds them in its cache, unless there are fewer rows than threads.
template <class R, class First, class Second, class Last>
void sweep(int64_t rows, int64_t vocab, First first, Second second, Last last) {
  const int64_t size = slice_size(vocab), slices = (vocab + size - 1) / size;
  std::vector<Scan> parts(2 * rows * slices), whole(2 * rows);
  std::vector<R> results(rows * slices);
  auto start = [&](int64_t i) { return i % slices * size; };
  auto end = [&](int64_t i) { return std::min(start(i) + size, vocab); };
  auto scan = [&](int64_t i) { first(i / slices, start(i), end(i), &parts[2 * i]); };
  auto combine = [&](int64_t row) {
    for (int m = 0; m < 2; ++m)
      whole[2 * row + m] = combined(&parts[2 * row * slices + m], slices, 2);
  };
  auto measure = [&](int64_t i) {
    results[i] = second(i / slices, &whole[i / slices * 2], start(i), end(i));
  };
  auto finish = [&](int64_t row) { last(row, &whole[2 * row], &results[row * slices], slices); };
  auto each = [](int64_t count, int64_t grain, auto work) {
    at::parallel_for(0, count, grain, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) work(i);
    });
  };
  if (slices > 1 && rows < at::get_num_threads() && !at::in_parallel_region()) {
    each(rows * slices, 1, scan);
    for (int64_t row = 0; row < rows; ++row) combine(row);
    each(rows * slices, 1, measure);
    for (int64_t row = 0; row < rows; ++row) finish(row);
    return;
  }
  constexpr int64_t WORTH_A_THREAD = 1 << 15;  // entries
  each(rows, std::max<int64_t>(1, WORTH_A_THREAD / vocab), [&](int64_t row) {
    const int64_t from = row * slices, to = from + slices;
    for (int64_t i = from; i < to; ++i) scan(i);
    combine(row);
    for (int64_t i = to; i-- > from;) measure(i);  // what was read last is still in the cache
    finish(row);
  });
}

}  // namespace
}  // namespace switchkd
