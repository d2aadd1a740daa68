// The op of the library `switchkd_native` that select.cu computes, and the checks of its arguments.
//
// It knows no CUDA: torch's stream comes as an integer, so this compiles wherever torch is.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "plan.h"

namespace switchkd {
namespace cuda {
namespace {

using at::Tensor;
using std::optional;

#if defined(SWITCHKD_EMULATED)
constexpr auto DEVICE = c10::DeviceType::CPU;
#else
constexpr auto DEVICE = c10::DeviceType::CUDA;
#endif

Model logits_of(const char* name, const Tensor& x, int64_t vocab) {
  const auto type = x.scalar_type();
  TORCH_CHECK(x.device().type() == DEVICE, name, " must be on ", DEVICE, ", got ", x.device());
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name,
              " must be float32, bfloat16 or float16, got ", type);
  TORCH_CHECK(x.dim() == 2, name, " must be (rows, vocabulary), got ", x.sizes());
  TORCH_CHECK(x.size(1) == 1 || x.stride(1) == 1, name, " must have rows with stride 1, got ",
              x.stride(1));
  TORCH_CHECK(vocab >= 1 && vocab <= x.size(1) && vocab <= MAX_VOCAB, "vocab_size must be in [1, ",
              x.size(1), "] and at most ", MAX_VOCAB, ", got ", vocab);
  Model model = {};
  model.logits = x.const_data_ptr();
  model.stride = x.stride(0);
  model.dtype = type == at::kFloat ? FLOAT32 : type == at::kHalf ? FLOAT16 : BFLOAT16;
  return model;
}

template <class T>
PerRow<T> per_row(const char* name, const Tensor& x, const Tensor& like) {
  constexpr auto type = c10::CppTypeToScalarType<T>::value;
  TORCH_CHECK(x.device() == like.device() && x.scalar_type() == type, name, " must be ", type,
              " on ", like.device(), ", got ", x.scalar_type(), " on ", x.device());
  TORCH_CHECK(x.dim() == 1 && x.size(0) == like.size(0), name, " must be (", like.size(0),
              "), got ", x.sizes());
  return {x.const_data_ptr<T>(), x.stride(0)};
}

// How the work is split: as asked for, in clusters or in splits of streamed rows, or as is best.
Plan plan_of(const Selection& how, int64_t device_index, int64_t cluster, int64_t splits) {
  const Dtype teacher = how.model[0].dtype, student = how.model[1].dtype;
  Device device;
  const char* error = describe(static_cast<int>(device_index), &device);
  TORCH_CHECK(error == nullptr, "device ", device_index, ": ", error);
  TORCH_CHECK(device.capability >= 80, "the kernels need compute capability 8.0, got ",
              device.capability / 10, ".", device.capability % 10);
  TORCH_CHECK(cluster >= 0 && cluster <= MAX_CLUSTER && (cluster & (cluster - 1)) == 0,
              "cluster must be 0, 1, 2, 4 or 8, got ", cluster);
  TORCH_CHECK(splits >= 0 && splits <= MAX_SPLITS && (splits == 0 || cluster == 0),
              "splits must be in [0, ", MAX_SPLITS, "] and 0 for a cluster, got ", splits);
  if (cluster == 0 && splits == 0)
    return plan_for(device, how.rows, how.vocab, teacher, student);
  const Plan plan = cluster > 0
      ? resident_plan(how.vocab, teacher, student, static_cast<int>(cluster))
      : streaming_plan(how.vocab, teacher, student, static_cast<int>(splits));
  TORCH_CHECK(cluster == 0 || fits(plan, device, 1), "blocks of a cluster of ", cluster, " need ",
              plan.shared_bytes, " bytes of shared memory and compute capability 9.0, the device "
              "has ", device.block_bytes, " and ", device.capability / 10, ".",
              device.capability % 10);
  return plan;
}

// As switch_select of the library, on `stream` of the logits' device; `cluster` and `splits` as in
// plan_of. Nothing waits for the device.
std::tuple<Tensor, Tensor, Tensor> cuda_switch_select(
    const Tensor& teacher, const Tensor& student, const Tensor& threshold, const Tensor& ids,
    const Tensor& positions, const optional<Tensor>& teacher_token,
    const optional<Tensor>& student_token, int64_t seed, double teacher_temperature,
    double student_temperature, int64_t teacher_stream, int64_t student_stream,
    c10::string_view metric, bool bits, int64_t vocab, int64_t stream, int64_t cluster,
    int64_t splits) {
  Selection how = {};
  how.model[0] = logits_of("teacher logits", teacher, vocab);
  how.model[1] = logits_of("student logits", student, vocab);
  how.rows = teacher.size(0);
  how.vocab = vocab;
  TORCH_CHECK(student.size(0) == how.rows && student.device() == teacher.device(),
              "teacher and student must have as many rows on one device, got ", how.rows, " on ",
              teacher.device(), " and ", student.size(0), " on ", student.device());
  TORCH_CHECK(how.rows <= (int64_t{1} << 31) / MAX_CLUSTER - 1, "rows must be below 2^28, got ",
              how.rows);
  TORCH_CHECK(metric == "jsd" || metric == "kl" || metric == "rank",
              "metric must be one of jsd, kl, rank, got '", metric, "'");
  const optional<Tensor>* known[2] = {&teacher_token, &student_token};
  const double temperatures[2] = {teacher_temperature, student_temperature};
  const int64_t streams[2] = {teacher_stream, student_stream};
  for (int m = 0; m < 2; ++m) {
    Model& model = how.model[m];
    model.draw = *known[m] ? KNOWN : temperatures[m] == 0.0 ? GREEDY : NOISE;
    if (*known[m]) model.known = per_row<int64_t>("known token", **known[m], teacher);
    model.temperature = static_cast<float>(temperatures[m]);
    model.inverse = model.draw == NOISE ? static_cast<float>(1.0 / temperatures[m]) : 0.0f;
    model.stream = static_cast<int>(streams[m]);
  }
  how.threshold = per_row<float>("threshold", threshold, teacher);
  how.id = per_row<int64_t>("sequence_ids", ids, teacher);
  how.position = per_row<int64_t>("positions", positions, teacher);
  how.seed = static_cast<uint64_t>(seed);
  how.metric = metric == "jsd" ? JSD_NATS : metric == "kl" ? KL : RANK;
  how.bits = bits;
  how.plan = plan_of(how, std::max<int64_t>(teacher.device().index(), 0), cluster, splits);
  Tensor token = at::empty({how.rows}, ids.options());
  Tensor writer = at::empty({how.rows}, ids.options().dtype(at::kBool));
  Tensor value = at::empty({3, how.rows}, ids.options().dtype(at::kFloat));
  Tensor partial = at::empty({partial_floats(how.rows, how.plan.splits)}, value.options());
  how.token = token.mutable_data_ptr<int64_t>();
  how.writer = writer.mutable_data_ptr<bool>();
  how.value = value.mutable_data_ptr<float>();
  how.partial = partial.mutable_data_ptr<float>();
  const char* error = launch(how, reinterpret_cast<void*>(stream));
  TORCH_CHECK(error == nullptr, "the kernel of switch_select cannot be launched on ",
              teacher.device(), ": ", error);
  return {token, writer, value};
}

}  // namespace

#if defined(SWITCHKD_EMULATED)
TORCH_LIBRARY_IMPL(switchkd_native, CPU, library) {
#else
TORCH_LIBRARY_IMPL(switchkd_native, CUDA, library) {
#endif
  library.impl("cuda_switch_select", &cuda_switch_select);
}

}  // namespace cuda
}  // namespace switchkd
