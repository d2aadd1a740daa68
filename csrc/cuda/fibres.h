// The threads of a cluster as fibres of one thread, for emulated.h.
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

}  // namespace cuda
}  // namespace switchkd
