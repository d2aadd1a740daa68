// hopper.h on a CPU, for tests: the kernels' own source runs, a fibre for each thread of a cluster.
//
// A bulk copy is made when another thread waits, out of order; other copies when their own thread
// waits for them. What a kernel should have waited for is not there yet.
#pragma once

#include "../scalar.h"
#include "fibres.h"

#define SWITCHKD_KERNEL(...) void
#define SWITCHKD_DEVICE inline
#define SWITCHKD_CONSTANT
#define SWITCHKD_CLUSTERS 1

namespace switchkd {
namespace cuda {

inline int thread_index() { return emulated::current().index; }
inline int64_t block_row() {
  const emulated::Quiet quiet;
  return emulated::cluster()->row_block + emulated::current().rank;
}
inline int block_split() {
  const emulated::Quiet quiet;
  return emulated::cluster()->split;
}
inline char* block_memory() { return emulated::block().memory; }
inline void block_sync() { emulated::meet(emulated::block().meeting); }

// ------------------------------------------------------------------------------- warps

// All lanes' values, for as long as the warp does not meet twice more.
template <class T>
const emulated::Value* warp_values(const T& mine) {
  static_assert(sizeof(T) <= sizeof(emulated::Value), "");
  const emulated::Quiet quiet;
  emulated::Warp& warp = emulated::warp();
  auto* values = warp.value[warp.meeting.turn % 2];
  std::memcpy(values + emulated::current().index % 32, &mine, sizeof mine);
  emulated::meet(warp.meeting);
  return values;
}
template <class T>
T of_lane(const T& mine, int lane) {
  T found;
  std::memcpy(&found, warp_values(mine) + lane, sizeof found);
  return found;
}

template <class T>
T shuffle_xor(const T& mine, int mask) {
  return of_lane(mine, (emulated::current().index % 32) ^ mask);
}
inline int first_lane(int value) { return of_lane(value, 0); }
inline int warp_max(int value) {
  const auto* values = warp_values(value);
  for (int lane = 0; lane < 32; ++lane) {
    int other;
    std::memcpy(&other, values + lane, sizeof other);
    value = std::max(value, other);
  }
  return value;
}
inline bool any_lane(bool holds) { return warp_max(holds) != 0; }

// ------------------------------------------------------------------------------- memory

inline int atomic_max(int* at, int value) {
  int found = __atomic_load_n(at, __ATOMIC_RELAXED);
  __atomic_store_n(at, std::max(found, value), __ATOMIC_RELAXED);
  return found;
}
inline int atomic_add(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline void memory_fence() {}
inline float fresh(const float* at) { return *at; }
inline float half_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7FFFu;
  if (rest >= 0x7C00u) return as_float(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
  return as_float(sign | as_bits(as_float(rest << 13) * 0x1p112f));  // the exponent's bias
}

inline void async_copy(void* to, const void* from) {
  emulated::Thread& me = emulated::current();
  me.copies.push_back({to, from, 16, nullptr, me.group});
}
inline void async_commit() { ++emulated::current().group; }
template <int PENDING>
void async_wait() {
  emulated::Thread& me = emulated::current();
  std::vector<emulated::Copy> later;
  for (const emulated::Copy& copy : me.copies) {
    if (copy.group >= me.group - PENDING) later.push_back(copy);
    else std::memcpy(copy.to, copy.from, copy.bytes);
  }
  me.copies.swap(later);
}

// ------------------------------------------------------------------------------- clusters

inline void barrier_start(Barrier* barrier) {
  const emulated::Quiet quiet;
  *barrier = {0, false};
}
inline void barriers_ready() {}
inline void barrier_expect(Barrier* barrier, int bytes) {
  const emulated::Quiet quiet;
  barrier->bytes += bytes;
  barrier->expected = true;
  emulated::publish(barrier);
}
inline void barrier_wait(Barrier* barrier) {
  const emulated::Quiet quiet;
  for (;;) {
    if (emulated::random_word() % 4 == 0) emulated::make_a_copy();
    emulated::observe(barrier);
    if (barrier->expected && barrier->bytes == 0) return;
    emulated::yield();
  }
}
inline void bulk_copy(void* to, const void* from, int bytes, Barrier* barrier) {
  const auto odd = (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16;
  if (odd != 0 || bytes <= 0 || bytes % 16 != 0) emulated::fail("a bulk copy is not aligned");
  const emulated::Quiet quiet;
  emulated::cluster()->copies.push_back({to, from, bytes, barrier, 0});
}

inline int cluster_rank() { return emulated::current().rank; }
inline void cluster_arrive() {
  const emulated::Quiet quiet;
  emulated::current().cluster_turn = emulated::cluster()->meeting.turn;
  emulated::arrive(emulated::cluster()->meeting);
}
inline void cluster_wait() {
  const emulated::Quiet quiet;
  emulated::wait(emulated::cluster()->meeting, emulated::current().cluster_turn);
}
template <class T>
T* at_rank(T* mine, int rank) {
  const char* at = reinterpret_cast<const char*>(mine);
  return reinterpret_cast<T*>(emulated::cluster()->blocks[rank]->memory + (at - block_memory()));
}

// ------------------------------------------------------------------------------- host

template <class... Values, class... Given>
const char* run(void (*kernel)(Values...), int64_t blocks, int splits, int cluster,
                int64_t shared_bytes, void*, const Given&... given) {
  struct Call {
    void (*kernel)(Values...);
    std::tuple<Values...> values;
  } call{kernel, {Values(given)...}};
  const auto body = [](void* argument) {
    Call& call = *static_cast<Call*>(argument);
    std::apply(call.kernel, call.values);
  };
  const int size = std::max(cluster, 1);
  for (int64_t first = 0; first < blocks; first += size)
    for (int split = 0; split < splits; ++split)
      emulated::run_cluster(first, split, size, shared_bytes, body, &call);
  return nullptr;
}

inline const char* query(int, Device* device) {
  *device = {90, 132, 232448, 233472};  // an H100
  return nullptr;
}

}  // namespace cuda
}  // namespace switchkd
