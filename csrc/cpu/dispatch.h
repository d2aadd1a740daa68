// Which instruction set the kernels run on.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <string>

#include "kernels.h"

namespace switchkd {
namespace {

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

}  // namespace
}  // namespace switchkd
