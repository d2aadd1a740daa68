// The ops that draw tokens: switch_select and sample.
#pragma once

#include <ATen/ops/empty.h>

#include <string_view>
#include <tuple>

#include "arguments.h"
#include "dispatch.h"
#include "sweep.h"

namespace switchkd {
namespace {

// Tokens, writers and (divergence, log p, log q) a row; a row that defines no distribution has
// token -1 and NaN.
std::tuple<Tensor, Tensor, Tensor> switch_select(
    const Tensor& teacher, const Tensor& student, const Tensor& threshold, const Tensor& ids,
    const Tensor& positions, const optional<Tensor>& teacher_token,
    const optional<Tensor>& student_token, int64_t seed, double teacher_temperature,
    double student_temperature, int64_t teacher_stream, int64_t student_stream,
    c10::string_view metric, bool bits, int64_t vocab) {
  const Pair pair = pair_of(teacher, student, vocab);
  const int64_t rows = teacher.size(0);
  TORCH_CHECK(metric == "jsd" || metric == "kl" || metric == "rank",
              "metric must be one of jsd, kl, rank, got '", metric, "'");
  const Metric measured = metric == "jsd" ? JSD_NATS : metric == "kl" ? KL : RANK;
  const auto thresholds = per_row<float>("threshold", threshold, rows);
  const auto id = per_row<int64_t>("sequence_ids", ids, rows);
  const auto position = per_row<int64_t>("positions", positions, rows);
  PerRow<int64_t> known[2] = {};
  Sampling how;
  how.seed = static_cast<uint64_t>(seed);
  const optional<Tensor>* given[2] = {&teacher_token, &student_token};
  const double temperatures[2] = {teacher_temperature, student_temperature};
  const int64_t streams[2] = {teacher_stream, student_stream};
  for (int m = 0; m < 2; ++m) {
    if (*given[m]) known[m] = per_row<int64_t>("known token", **given[m], rows);
    how.draw[m] = *given[m] ? NONE : temperatures[m] == 0.0 ? GREEDY : NOISE;
    how.temperature[m] = static_cast<float>(temperatures[m]);
    how.stream[m] = static_cast<int>(streams[m]);
  }
  Tensor token = at::empty({rows}, ids.options());
  Tensor writer = at::empty({rows}, ids.options().dtype(at::kBool));
  Tensor value = at::empty({3, rows}, ids.options().dtype(at::kFloat));
  int64_t* tokens = token.data_ptr<int64_t>();
  bool* writers = writer.data_ptr<bool>();
  float* values = value.data_ptr<float>();
  const Kernels& run = *current.load();

  auto token_of = [&](int m, int64_t row, const Scan* scans) {
    return how.draw[m] == NONE ? known[m][row] : scans[m].token;
  };
  auto valid = [&](int64_t row, const Scan* scans) {
    for (int m = 0; m < 2; ++m) {
      const int64_t drawn = token_of(m, row, scans);
      if (!is_distribution(scans[m].total) || drawn < 0 || drawn >= vocab) return false;
    }
    return true;
  };
  sweep<float>(
      rows, vocab,
      [&](int64_t row, int64_t start, int64_t end, Scan* out) {
        Sampling mine = how;
        mine.id = id[row];
        mine.position = position[row];
        run.scan(pair, mine, row, start, end, out);
      },
      [&](int64_t row, const Scan* scans, int64_t start, int64_t end) {
        if (!valid(row, scans)) return 0.0f;
        float rival = 0.0f;
        if (measured == RANK) rival = run.logit(pair, 0, row, token_of(1, row, scans));
        return run.measure(pair, scans, measured, rival, row, start, end);
      },
      [&](int64_t row, const Scan* scans, const float* parts, int64_t slices) {
        if (!valid(row, scans)) {
          tokens[row] = -1;
          writers[row] = false;
          for (int i = 0; i < 3; ++i) values[i * rows + row] = NAN;
          return;
        }
        float divergence = 0.0f;
        for (int64_t i = 0; i < slices; ++i) divergence += parts[i];
        if (measured == KL) divergence = std::min(divergence, 50.0f);
        if (measured == JSD_NATS) {  // rounding does not lift disjoint rows over one bit
          divergence = std::min(divergence, LN2);
          if (bits) divergence = std::min(divergence * 1.4426950408889634f, 1.0f);
        }
        writers[row] = divergence > thresholds[row];
        tokens[row] = token_of(writers[row] ? 0 : 1, row, scans);
        values[row] = divergence;
        for (int m = 0; m < 2; ++m) {
          const float z = run.logit(pair, m, row, tokens[row]);
          values[(1 + m) * rows + row] = (z - scans[m].top) - std::log(scans[m].total);
        }
      });
  return {token, writer, value};
}

Tensor sample(const Tensor& logits, const Tensor& ids, const Tensor& positions, int64_t seed,
              double temperature, int64_t top_k, double top_p, double min_p, int64_t vocab,
              int64_t stream) {
  const int64_t rows = logits.size(0);
  const Pair pair{{{nullptr, 0, false}, logits_of("logits", logits, vocab)}, vocab};
  const auto id = per_row<int64_t>("sequence_ids", ids, rows);
  const auto position = per_row<int64_t>("positions", positions, rows);
  Sampling how;
  how.seed = static_cast<uint64_t>(seed);
  how.draw[1] = temperature == 0.0 ? GREEDY : NOISE;
  how.temperature[1] = static_cast<float>(temperature);
  how.stream[1] = static_cast<int>(stream);
  how.softmax = false;
  const Filter filter{top_k < vocab ? top_k : 0, std::max(static_cast<float>(top_p), 1e-30f),
                      min_p > 0.0 ? static_cast<float>(std::log(min_p)) : -INFINITY};
  const bool filtered = temperature != 0.0 && (filter.top_k > 0 || top_p < 1.0 || min_p > 0.0);
  Tensor token = at::empty({rows}, ids.options());
  int64_t* tokens = token.data_ptr<int64_t>();
  const Kernels& run = *current.load();
  auto mine = [&](int64_t row) {
    Sampling of_row = how;
    of_row.id = id[row];
    of_row.position = position[row];
    return of_row;
  };
  if (filtered) {
    at::parallel_for(0, rows, 1, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row)
        tokens[row] = run.filtered_token(pair, mine(row), filter, row);
    });
    return token;
  }
  sweep<int>(
      rows, vocab,
      [&](int64_t row, int64_t start, int64_t end, Scan* out) {
        run.scan(pair, mine(row), row, start, end, out);
      },
      [](int64_t, const Scan*, int64_t, int64_t) { return 0; },
      [&](int64_t row, const Scan* scans, const int*, int64_t) {
        tokens[row] = is_distribution(scans[1].total) ? scans[1].token : -1;
      });
  return token;
}

}  // namespace
}  // namespace switchkd
