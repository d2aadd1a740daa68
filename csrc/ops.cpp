// Schemas of every native op, the checks of their arguments, and the split of rows over threads.
//
// The library `switchkd_native` is not the public one: switchkd_kernels calls it with arguments that
// it has checked, and torch.compile sees the ops of the library `switchkd` around it.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "rowwise.h"

namespace switchkd {

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

namespace {

using at::Tensor;
using std::optional;

// ------------------------------------------------------------------------------- instruction set

bool runs(const std::string& capability) {
#if defined(SWITCHKD_X86)
  if (capability == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (capability == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return capability == "baseline";
}

const Kernels* kernels_of(const std::string& capability) {
#if defined(SWITCHKD_X86)
  if (capability == "avx512") return &avx512::KERNELS;
  if (capability == "avx2") return &avx2::KERNELS;
#endif
  return &baseline::KERNELS;
}

std::string best_capability() {
  for (const char* name : {"avx512", "avx2"})
    if (runs(name)) return name;
  return "baseline";
}

std::atomic<const Kernels*> current{kernels_of(best_capability())};

// Takes the kernels for an instruction set, "" the best, and names the one that is used.
std::string use(std::string capability) {
  if (capability.empty()) capability = best_capability();
  TORCH_CHECK(runs(capability), "instruction set must be one of avx512, avx2 and baseline that "
              "this processor has, got '", capability, "'");
  current = kernels_of(capability);
  return capability;
}

// ------------------------------------------------------------------------------- arguments

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

// ------------------------------------------------------------------------------- threads

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

// ------------------------------------------------------------------------------- draws

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

// ------------------------------------------------------------------------------- losses

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

// (M,) nats and (5, M) for backward: maximum and sum of the teacher's and student's softmax, sum u.
// Masked rows are 0, undefined ones NaN.
std::tuple<Tensor, Tensor> divergence(
    const Tensor& teacher, const Tensor& student, const optional<Tensor>& mask, int64_t kind,
    double weight, bool detach, int64_t vocab, bool needs_grad) {
  const Pair pair = pair_of(teacher, student, vocab);
  const int64_t rows = student.size(0);
  const Loss form = loss_of(kind, weight, detach);
  const auto kept = mask ? per_row<bool>("mask", *mask, rows) : PerRow<bool>{};
  Tensor loss = at::empty({rows}, student.options().dtype(at::kFloat));
  Tensor saved = at::empty({5, rows}, loss.options());
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
        return run.totals(pair, scans, form, needs_grad, row, start, end);
      },
      [&](int64_t row, const Scan* scans, const Totals* parts, int64_t slices) {
        const bool valid = is_distribution(scans[0].total) && is_distribution(scans[1].total);
        losses[row] = valid ? loss_value(form, parts, slices) : NAN;
        for (int m = 0; m < 2; ++m) {
          save[2 * m * rows + row] = scans[m].top;
          save[(2 * m + 1) * rows + row] = scans[m].total;
        }
        save[4 * rows + row] = sum_u(parts, slices);
      });
  return {loss, saved};
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
        return run.totals(pair, scans, form, needs_grad, row, start, end);
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

// -------------------------------------------------------------------------------------- linear

Tensor linear(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias,
              bool transposed) {
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

TORCH_LIBRARY(switchkd_native, library) {
  library.def("use(str instruction_set) -> str", &use);
  library.def(
      "switch_select(Tensor teacher, Tensor student, Tensor threshold, Tensor sequence_ids, "
      "Tensor positions, Tensor? teacher_token, Tensor? student_token, int seed, "
      "float teacher_temperature, float student_temperature, int teacher_stream, "
      "int student_stream, str metric, bool bits, int vocab_size) -> (Tensor, Tensor, Tensor)");
  library.def(
      "sample(Tensor logits, Tensor sequence_ids, Tensor positions, int seed, float temperature, "
      "int top_k, float top_p, float min_p, int vocab_size, int stream) -> Tensor");
  library.def(
      "divergence(Tensor teacher, Tensor student, Tensor? mask, int kind, float weight, "
      "bool detach, int vocab_size, bool needs_grad) -> (Tensor, Tensor)");
  library.def(
      "divergence_backward(Tensor upstream, Tensor teacher, Tensor student, Tensor? mask, "
      "Tensor saved, int kind, float weight, bool detach, int vocab_size) -> Tensor");
  library.def(
      "head_chunk(Tensor? teacher, Tensor(a!) student, Tensor? teacher_bias, "
      "Tensor? student_bias, Tensor? labels, int kind, float weight, bool detach, "
      "int vocab_size, float logit_scale, float softcap, float ce_weight, bool needs_grad) "
      "-> Tensor");
  library.def("linear(Tensor x, Tensor weight, Tensor? bias, bool transposed) -> Tensor");
  library.def(  // of cuda/ops.cpp, a library of its own
      "cuda_switch_select(Tensor teacher, Tensor student, Tensor threshold, Tensor sequence_ids, "
      "Tensor positions, Tensor? teacher_token, Tensor? student_token, int seed, "
      "float teacher_temperature, float student_temperature, int teacher_stream, "
      "int student_stream, str metric, bool bits, int vocab_size, int stream, int cluster, "
      "int splits) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(switchkd_native, CPU, library) {
  library.impl("switch_select", &switch_select);
  library.impl("sample", &sample);
  library.impl("divergence", &divergence);
  library.impl("divergence_backward", &divergence_backward);
  library.impl("head_chunk", &head_chunk);
  library.impl("linear", &linear);
}

}  // namespace switchkd
