// What every file here stands on: the instruction set's namespace, and functions of a float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SWITCHKD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SWITCHKD_HOST_DEVICE inline __attribute__((always_inline))
#endif
#if defined(__CUDA_ARCH__)
#define SWITCHKD_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)  // its pass over the host's code
#define SWITCHKD_UNROLL
#else
#define SWITCHKD_UNROLL _Pragma("GCC unroll 10")
#endif

// One source is compiled for several instruction sets. Each has a namespace of its own: the linker
// keeps one copy of an inline function, and it must not be one that the processor cannot run.
#ifndef SWITCHKD_CAPABILITY
#define SWITCHKD_CAPABILITY scalar
#endif

namespace switchkd {
inline namespace SWITCHKD_CAPABILITY {

constexpr float LN2 = 0.6931471805599453f;

#if defined(__CUDA_ARCH__)  // an instruction each; of a NaN and a number the number
SWITCHKD_HOST_DEVICE float exp(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634f));
  return power;
}
SWITCHKD_HOST_DEVICE float min(float a, float b) { return ::fminf(a, b); }
SWITCHKD_HOST_DEVICE float max(float a, float b) { return ::fmaxf(a, b); }
#else
SWITCHKD_HOST_DEVICE float exp(float x) { return ::expf(x); }
// b if either is NaN, as the instructions of x86 have it.
SWITCHKD_HOST_DEVICE float min(float a, float b) { return a < b ? a : b; }
SWITCHKD_HOST_DEVICE float max(float a, float b) { return a > b ? a : b; }
#endif
// scale e^x for -87 <= x <= 88.
SWITCHKD_HOST_DEVICE float exp_in_range(float x, float scale = 1.0f) { return exp(x) * scale; }
SWITCHKD_HOST_DEVICE float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
SWITCHKD_HOST_DEVICE uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
SWITCHKD_HOST_DEVICE float log(float x) { return ::logf(x); }
SWITCHKD_HOST_DEVICE float abs(float x) { return ::fabsf(x); }
SWITCHKD_HOST_DEVICE float select(bool where, float a, float b) { return where ? a : b; }

}  // namespace SWITCHKD_CAPABILITY
}  // namespace switchkd
