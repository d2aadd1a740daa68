// Schemas of every native op, and their CPU kernels.
//
// The library `switchkd_native` is not the public one: switchkd_kernels calls it with arguments that
// it has checked, and torch.compile sees the ops of the library `switchkd` around it. What needs
// torch is one translation unit: its headers take longer to compile than all of ours.
#include <torch/library.h>

#include "cpu/draw_ops.h"
#include "cpu/linear_op.h"
#include "cpu/loss_ops.h"

namespace switchkd {

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
      "bool detach, int vocab_size, bool needs_grad, bool needs_unit) "
      "-> (Tensor, Tensor, Tensor)");
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
