// What the kernels of switch_select take, and how their work is split: plain C++, without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#ifndef SWITCHKD_THREADS
#define SWITCHKD_THREADS 512
#endif

namespace switchkd {
namespace cuda {

constexpr int THREADS = SWITCHKD_THREADS, WARPS = THREADS / 32;  // of a block
constexpr int QUAD = 4;                                          // tokens that share a call of Philox
constexpr int TILE = 2 * QUAD * THREADS;  // tokens that are copied together: two quads a thread
constexpr int STREAM_SLOTS = 3;           // tiles in flight where rows are streamed
constexpr int MAX_TILES = 64, MAX_CLUSTER = 8, MAX_SPLITS = 64;
constexpr int64_t MAX_VOCAB = int64_t{1} << 28;  // bytes of a row are counted in 32 bits
constexpr int64_t HEADER_BYTES = 2048;  // of shared memory, for what is not logits

enum Dtype : int { FLOAT32, BFLOAT16, FLOAT16 };
enum Draw : int { KNOWN, GREEDY, NOISE };
enum Metric : int { RANK, KL, JSD_NATS };

constexpr int size_of(Dtype dtype) { return dtype == FLOAT32 ? 4 : 2; }

// What a GPU has: 10 major + minor, multiprocessors, bytes that a block and a processor may use.
struct Device {
  int capability, processors;
  int64_t block_bytes, processor_bytes;
};

struct Plan {
  int cluster;  // blocks that keep a pair of rows in their shared memory; 0: it is streamed, twice
  int splits;   // blocks that share a row that is streamed
  int slots;    // tiles that a block has room for
  int64_t slice;          // tokens of a block
  int64_t teacher_bytes;  // of its shared memory, for the teacher's logits
  int64_t shared_bytes;   // in all
};

constexpr int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tile begins as far behind a multiple of 16 bytes as in its row, so a slot is 16 bytes longer
// than a tile; the last one may be cut short.
inline Plan with_bytes(Plan plan, Dtype teacher, Dtype student) {
  const int64_t tokens = std::min<int64_t>(plan.slice, int64_t{plan.slots} * TILE);
  plan.teacher_bytes = tokens * size_of(teacher) + 16 * plan.slots;
  plan.shared_bytes =
      HEADER_BYTES + plan.teacher_bytes + tokens * size_of(student) + 16 * plan.slots;
  return plan;
}

// A pair of rows over a cluster, in slices that begin at multiples of 16 bytes if their row does.
inline Plan resident_plan(int64_t vocab, Dtype teacher, Dtype student, int cluster) {
  const int64_t slice = divided(divided(vocab, cluster), 8) * 8;
  return with_bytes({cluster, 1, static_cast<int>(divided(slice, TILE)), slice, 0, 0}, teacher,
                    student);
}

inline Plan streaming_plan(int64_t vocab, Dtype teacher, Dtype student, int splits) {
  const int64_t slice = divided(divided(vocab, splits), TILE) * TILE;
  return with_bytes({0, static_cast<int>(divided(vocab, slice)), STREAM_SLOTS, slice, 0, 0},
                    teacher, student);
}

// Whether such a cluster can run, `blocks` of its blocks on a processor. Each takes 1 KB more.
inline bool fits(const Plan& plan, const Device& device, int blocks) {
  return device.capability >= 90 && plan.cluster >= 1 && plan.cluster <= MAX_CLUSTER &&
         plan.slots <= MAX_TILES && plan.shared_bytes <= device.block_bytes &&
         blocks * (plan.shared_bytes + 1024) <= device.processor_bytes;
}

// The smallest cluster that leaves room for a second block on each processor, which computes while
// the first one's rows arrive; else the smallest that fits; wider for rows that would leave
// processors idle. Rows that no cluster holds, and GPUs without clusters, are streamed, in splits
// until there are two blocks for each processor.
inline Plan plan_for(const Device& device, int64_t rows, int64_t vocab, Dtype teacher,
                     Dtype student) {
  for (int blocks = 2; blocks >= 1; --blocks) {
    for (int cluster = 1; cluster <= MAX_CLUSTER; cluster *= 2) {
      if (!fits(resident_plan(vocab, teacher, student, cluster), device, blocks)) continue;
      while (cluster < MAX_CLUSTER && rows * cluster * 2 <= device.processors &&
             vocab > int64_t{cluster} * TILE)
        cluster *= 2;
      return resident_plan(vocab, teacher, student, cluster);
    }
  }
  const int64_t wanted = 2 * device.processors / std::max<int64_t>(rows, 1);
  const int64_t splits = std::min({wanted, divided(vocab, TILE), int64_t{MAX_SPLITS}});
  return streaming_plan(vocab, teacher, student, static_cast<int>(std::max<int64_t>(splits, 1)));
}

// ------------------------------------------------------------------------------- arguments

template <class T>
struct PerRow {
  const T* data;
  int64_t stride;
};

struct Model {
  const void* logits;  // row i begins at entry i * stride
  int64_t stride;
  Dtype dtype;
  Draw draw;
  PerRow<int64_t> known;  // KNOWN: its token
  float temperature, inverse;
  int stream;
};

struct Selection {
  Model model[2];  // teacher, student
  PerRow<float> threshold;
  PerRow<int64_t> id, position;
  uint64_t seed;
  int64_t rows, vocab;
  Metric metric;
  bool bits;
  int64_t* token;  // (rows)
  bool* writer;    // (rows)
  float* value;    // (3, rows): divergence, log p, log q
  // Between blocks that share a streamed row: (rows, splits) of 8 floats, (rows, splits) floats and
  // (rows) counters; else absent.
  float* partial;
  Plan plan;
};

constexpr int64_t partial_floats(int64_t rows, int64_t splits) {
  return splits > 1 ? rows * (9 * splits + 1) : 0;
}

// What a GPU has, and the launch on a stream (cudaStream_t) of the current device: what went
// wrong, or null. Neither waits for the device.
const char* describe(int index, Device* device);
const char* launch(const Selection& how, void* stream);

}  // namespace cuda
}  // namespace switchkd
