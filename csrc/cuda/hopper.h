// CUDA as the kernels use it, and of Hopper what C++ has no name for; emulated.h is its twin.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "plan.h"

#define SWITCHKD_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define SWITCHKD_DEVICE __device__ __forceinline__
#define SWITCHKD_CONSTANT __grid_constant__

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SWITCHKD_CLUSTERS 1
#endif

namespace switchkd {
namespace cuda {

SWITCHKD_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
SWITCHKD_DEVICE int64_t block_row() { return blockIdx.x; }
SWITCHKD_DEVICE int block_split() { return static_cast<int>(blockIdx.y); }

SWITCHKD_DEVICE char* block_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

SWITCHKD_DEVICE void block_sync() { __syncthreads(); }

// ------------------------------------------------------------------------------- warps

constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

template <class T>
SWITCHKD_DEVICE T shuffle_xor(const T& mine, int mask) {
  constexpr int WORDS = sizeof(T) / 4;
  static_assert(sizeof(T) == 4 * WORDS, "");
  uint32_t word[WORDS];
  memcpy(word, &mine, sizeof mine);
#pragma unroll
  for (int i = 0; i < WORDS; ++i) word[i] = __shfl_xor_sync(ALL_LANES, word[i], mask);
  T other;
  memcpy(&other, word, sizeof other);
  return other;
}
SWITCHKD_DEVICE int first_lane(int value) { return __shfl_sync(ALL_LANES, value, 0); }
SWITCHKD_DEVICE bool any_lane(bool holds) { return __any_sync(ALL_LANES, holds) != 0; }
SWITCHKD_DEVICE int warp_max(int value) { return __reduce_max_sync(ALL_LANES, value); }

// ------------------------------------------------------------------------------- memory

SWITCHKD_DEVICE int atomic_max(int* at, int value) { return atomicMax(at, value); }
SWITCHKD_DEVICE int atomic_add(int* at, int value) { return atomicAdd(at, value); }
SWITCHKD_DEVICE void memory_fence() { __threadfence(); }
SWITCHKD_DEVICE float fresh(const float* at) { return __ldcg(at); }  // past the first-level cache
SWITCHKD_DEVICE float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

SWITCHKD_DEVICE uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// 16 aligned bytes to shared memory, complete after async_wait by the thread that asked for them.
SWITCHKD_DEVICE void async_copy(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :: "r"(shared_address(to)), "l"(from) : "memory");
}
SWITCHKD_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until no more than the last `PENDING` groups of this thread's copies are on their way.
template <int PENDING>
SWITCHKD_DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}

// ------------------------------------------------------------------------------- clusters

struct Barrier {
  uint64_t state;
};

#if defined(SWITCHKD_CLUSTERS)

// For one arrival, made known to the copy engine by `barriers_ready` of the same thread.
SWITCHKD_DEVICE void barrier_start(Barrier* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(shared_address(barrier)) : "memory");
}
SWITCHKD_DEVICE void barriers_ready() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The arrival; the barrier opens when this many bytes have been copied, too.
SWITCHKD_DEVICE void barrier_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Until a barrier has opened for the first time; then what it waited for can be read.
SWITCHKD_DEVICE void barrier_wait(Barrier* barrier) {
  uint32_t open;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(open) : "r"(shared_address(barrier)) : "memory");
  } while (!open);
}

// Multiples of 16 aligned bytes into this block's shared memory, by the copy engine.
SWITCHKD_DEVICE void bulk_copy(void* to, const void* from, int bytes, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

SWITCHKD_DEVICE int cluster_rank() { return static_cast<int>(__clusterRelativeBlockRank()); }
SWITCHKD_DEVICE void cluster_arrive() { __cluster_barrier_arrive(); }
SWITCHKD_DEVICE void cluster_wait() { __cluster_barrier_wait(); }

// The same place in the shared memory of another block of the cluster.
template <class T>
SWITCHKD_DEVICE T* at_rank(T* mine, int rank) {
  return static_cast<T*>(__cluster_map_shared_rank(mine, static_cast<unsigned>(rank)));
}

#endif

// ------------------------------------------------------------------------------- host

template <class... Values, class... Given>
const char* run(void (*kernel)(Values...), int64_t blocks, int splits, int cluster,
                int64_t shared_bytes, void* stream, const Given&... given) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(splits));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = cluster > 0;
    error = cudaLaunchKernelEx(&config, kernel, Values(given)...);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// As cudart knows it; this library has a cudart of its own, which follows the driver's context.
inline const char* query(int index, Device* device) {
  int major = 0, minor = 0, processors = 0, block = 0, processor = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } wanted[] = {
      {cudaDevAttrComputeCapabilityMajor, &major}, {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMultiProcessorCount, &processors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &block},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &processor},
  };
  cudaError_t error = cudaSetDevice(index);
  for (const auto& one : wanted)
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(one.value, one.attribute, index);
  *device = {10 * major + minor, processors, block, processor};
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace switchkd
