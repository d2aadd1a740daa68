// hopper.h on a CPU, for tests: the kernels' own source runs, a fibre for each thread of a cluster.
//
// Threads run until they wait, in an order that changes from cluster to cluster; barriers are real,
// shared memory starts out as NaN, and a copy is made as late as it may be, out of order. So what
// a kernel should have waited for is not there yet. A cluster in which nothing moves is an error.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "plan.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>

extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

#define SWITCHKD_KERNEL(...) void
#define SWITCHKD_DEVICE inline
#define SWITCHKD_CONSTANT
#define SWITCHKD_CLUSTERS 1

namespace switchkd {
namespace cuda {

struct Barrier {
  int64_t bytes;  // to come
  bool expected;
};

namespace emulated {

// The thread sanitizer is told which fibre runs, what orders one after another, and not to look at
// what is here, which is ordered by there being one processor.
#if defined(__SANITIZE_THREAD__)
inline void* new_fibre() { return __tsan_create_fiber(0); }
inline void end_fibre(void* fibre) { __tsan_destroy_fiber(fibre); }
inline void* this_fibre() { return __tsan_get_current_fiber(); }
inline void enter_fibre(void* fibre) { __tsan_switch_to_fiber(fibre, 1); }  // orders nothing
inline void publish(void* at) { __tsan_release(at); }
inline void observe(void* at) { __tsan_acquire(at); }
struct Quiet {
  Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
struct Quiet {
  Quiet() {}
};
inline void* new_fibre() { return nullptr; }
inline void end_fibre(void*) {}
inline void* this_fibre() { return nullptr; }
inline void enter_fibre(void*) {}
inline void publish(void*) {}
inline void observe(void*) {}
#endif

constexpr size_t STACK_BYTES = 1 << 17;

struct Copy {
  void* to;
  const void* from;
  int bytes;
  Barrier* barrier;  // of a bulk copy
  int group;         // of others
};

// Where a number of threads meet, again and again.
struct Meeting {
  int expected, arrived = 0;
  unsigned turn = 0;
};

struct Value {
  char bytes[32];
};
struct Warp {
  Meeting meeting{32};
  Value value[2][32];
};

struct Block {
  explicit Block(int64_t bytes) : memory(static_cast<char*>(std::aligned_alloc(128, bytes))) {
    std::memset(memory, 0xFF, bytes);
  }
  ~Block() { std::free(memory); }
  Block(const Block&) = delete;
  char* memory;
  Meeting meeting{THREADS};
  Warp warps[WARPS];
};

void start_thread();

struct Thread {
  Thread(int rank, int index) : rank(rank), index(index) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack.get();
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, start_thread, 0);
  }
  ~Thread() { end_fibre(fibre); }
  Thread(const Thread&) = delete;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  void* fibre = new_fibre();
  const int rank, index;
  int group = 0;
  unsigned cluster_turn = 0;
  bool done = false;
  std::vector<Copy> copies;
};

// The cluster that runs, one at a time.
struct Cluster {
  int64_t row_block;  // blockIdx.x of its first block
  int split;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Thread>> threads;  // in the order of their turns
  std::vector<Copy> copies;
  Meeting meeting;
  void (*body)(void*);
  void* argument;
  ucontext_t scheduler = {};
  void* fibre = this_fibre();
  size_t turn = 0;  // whose
  int idle = 0;      // rounds since anything moved
};

inline Cluster*& cluster() {
  static Cluster* running = nullptr;
  return running;
}
inline uint32_t random_word() {
  static uint32_t state = 1;
  return (state = state * 1664525u + 1013904223u) >> 8;
}
inline Thread& current() {
  const Quiet quiet;
  return *cluster()->threads[cluster()->turn];
}
inline Block& block() {
  const Quiet quiet;
  return *cluster()->blocks[current().rank];
}
inline Warp& warp() { return block().warps[current().index / 32]; }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

struct Turn {
  ucontext_t* context;
  void* fibre;
};

// Whose turn is next: a thread's, or the scheduler's when all are done.
inline Turn next_turn() {
  const Quiet quiet;
  Cluster& all = *cluster();
  for (size_t left = all.threads.size(); left > 0; --left) {
    if (++all.turn == all.threads.size()) {
      all.turn = 0;
      if (++all.idle > 100) fail("nothing moves: not all reach a barrier, or copies are missing");
    }
    if (!current().done) return {&current().context, current().fibre};
  }
  return {&all.scheduler, all.fibre};
}

inline void yield() {
  ucontext_t* const mine = &current().context;
  const Turn next = next_turn();
  if (next.context == mine) return;
  enter_fibre(next.fibre);
  swapcontext(mine, next.context);
}

inline void arrive(Meeting& at) {
  const Quiet quiet;
  publish(&at);
  if (++at.arrived < at.expected) return;
  at.arrived = 0;
  ++at.turn;
  cluster()->idle = 0;
}
inline void wait(Meeting& at, unsigned turn) {
  const Quiet quiet;
  while (at.turn == turn) yield();
  observe(&at);
}
inline void meet(Meeting& at) {
  const Quiet quiet;
  const unsigned turn = at.turn;
  arrive(at);
  wait(at, turn);
}

// One of the bulk copies on their way, whichever.
inline void make_a_copy() {
  const Quiet quiet;
  std::vector<Copy>& copies = cluster()->copies;
  if (copies.empty()) return;
  std::swap(copies[random_word() % copies.size()], copies.back());
  const Copy copy = copies.back();
  copies.pop_back();
  std::memcpy(copy.to, copy.from, copy.bytes);
  copy.barrier->bytes -= copy.bytes;
  publish(copy.barrier);
  cluster()->idle = 0;
}

inline void start_thread() {
  Cluster* all;
  {
    const Quiet quiet;
    all = cluster();
  }
  observe(all);
  all->body(all->argument);
  publish(all);
  {
    const Quiet quiet;
    current().done = true;
    all->idle = 0;
  }
  yield();
}

inline void run_cluster(int64_t row_block, int split, int size, int64_t bytes, void (*body)(void*),
                        void* argument) {
  Cluster all{row_block, split, {}, {}, {}, {size * THREADS}, body, argument};
  cluster() = &all;
  for (int rank = 0; rank < size; ++rank) {
    all.blocks.emplace_back(new Block((bytes + 127) / 128 * 128));
    for (int index = 0; index < THREADS; ++index)
      all.threads.emplace_back(new Thread(rank, index));
  }
  for (size_t i = all.threads.size(); i > 1; --i)
    std::swap(all.threads[i - 1], all.threads[random_word() % i]);
  publish(&all);
  enter_fibre(current().fibre);
  swapcontext(&all.scheduler, &current().context);
  observe(&all);
  if (!all.copies.empty()) fail("a block ended before its copies were made");
  cluster() = nullptr;
}

}  // namespace emulated

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
inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
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
