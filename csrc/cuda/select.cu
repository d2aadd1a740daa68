// switch_select on NVIDIA GPUs, sm_80 and up; not yet run on one.
//
// `resident` (sm_90 and up): a cluster of blocks decides a row. Each copies a slice of both models'
// logits into its shared memory, in bulk and all at once; the first sweep starts as tiles arrive and
// leaves softmax and token of either model, joined over the cluster through distributed shared
// memory; the second, from shared memory alone, leaves the divergence; the first block decides.
// `streaming`: rows that no cluster holds, and older GPUs. Tiles pass through a ring in shared memory
// twice, the second time from the L2 cache as far as it holds them. Few rows are split.
//
// Bytes of a pair of logits in bf16, counted: `resident` reads 4 from memory, once (rows that do not
// begin at multiples of 16 bytes read 16 bytes of every 8 KB again, which the L2 cache has), writes 4
// to shared memory and reads 8 there; `streaming` reads 8, of which 4 or more from memory.
// Instructions of a pair, counted in the machine code of resident<bf16, bf16> for sm_90a where no
// draw needs its logarithms: the first sweep 58 with noise (26 of them for Philox and its bounds), 32
// without; the JSD 35; 4.5 of these are exponentials, which take eight times an issue slot's time on
// their own units. So the issue of instructions is the limit and not memory: by its data sheet (132
// processors of 128 lanes at 1.7 GHz, 3.35 TB/s) an H100 issues 34 instructions in the time of 4
// bytes. Two blocks share a processor, 64 registers a thread, so that one computes while the other
// one's rows arrive. Whether this is ahead of Triton is to be measured; until then Triton is the
// default. The losses have no kernel here: nothing has been measured that says one would pay.
#include "rows.h"

namespace switchkd {
namespace cuda {
namespace {

// A cluster decides a row. Each block holds a slice of both models' logits in its shared memory.
template <int T, int S>
SWITCHKD_KERNEL(THREADS, 2) resident(const SWITCHKD_CONSTANT Selection how) {
#if defined(SWITCHKD_CLUSTERS)
  Shared& shared = shared_of_block();
  const int cluster = how.plan.cluster, rank = cluster_rank(), thread = thread_index();
  const int64_t row = block_row() / cluster;
  const Tiles tiles(how, row, rank, block_memory() + HEADER_BYTES);
  if (thread == 0) {
    fetch(tiles, shared.ready);
    shared.best[0] = shared.best[1] = ordered(static_cast<int>(as_bits(-INFINITY)));
  }
  for (int tile = 0; tile < tiles.count; ++tile) {
    if (tile > 0 && tile < tiles.count - 2) continue;  // the row's last line may lie in two tiles
    SWITCHKD_UNROLL
    for (int m = 0; m < 2; ++m) tiles.copy_edges(m, tile, tile);
  }
  cluster_arrive();
  block_sync();

  Draws draws(how, row);
  Scans mine = {{NOTHING, NOTHING}};
  for (int tile = 0; tile < tiles.count; ++tile) {
    barrier_wait(shared.ready + tile);
    scan_tile<T, S>(how, tiles, tile, tile, draws, shared.best, mine);
  }
  mine = block_join(mine, Scans{{NOTHING, NOTHING}}, shared.warp_scans);
  cluster_wait();  // every block of the cluster has started
  if (thread < cluster) *at_rank(shared.parts + rank, thread) = mine;
  cluster_arrive();
  cluster_wait();  // every part has come

  if (thread < 32) judge(how, row, shared.parts, cluster, shared.verdict);
  block_sync();
  float sum = measure<T, S>(how, tiles, shared, [&](auto body) {
    for (int tile = 0; tile < tiles.count; ++tile) body(tile, tile);
  });
  sum = block_join(sum, 0.0f, shared.warp_sums);
  if (thread == 0) *at_rank(shared.sums + rank, 0) = sum;
  cluster_arrive();
  cluster_wait();
  if (rank > 0 || thread >= 32) return;
  sum = warp_join(thread < cluster ? shared.sums[thread] : 0.0f);
  if (thread == 0) decide(how, row, shared.verdict, sum);
#endif
}

enum Phase : int { WHOLE, SCAN, DECIDE };

// A block decides a row, or scans a slice of it and then, launched again, measures it; the last
// one of a row to arrive adds up and decides.
template <int T, int S>
SWITCHKD_KERNEL(THREADS, 2) streaming(const SWITCHKD_CONSTANT Selection how, const Phase phase) {
  Shared& shared = shared_of_block();
  const int splits = how.plan.splits, split = block_split(), thread = thread_index();
  const int64_t row = block_row();
  const Tiles tiles(how, row, split, block_memory() + HEADER_BYTES);
  Scans* parts = reinterpret_cast<Scans*>(how.partial) + row * splits;
  float* sums = how.partial + how.rows * splits * 8 + row * splits;
  int* arrived = reinterpret_cast<int*>(how.partial + how.rows * splits * 9) + row;
  if (phase != DECIDE) {
    if (thread == 0)
      shared.best[0] = shared.best[1] = ordered(static_cast<int>(as_bits(-INFINITY)));
    Draws draws(how, row);
    Scans mine = {{NOTHING, NOTHING}};
    stream(tiles, [&](int tile, int slot) {
      scan_tile<T, S>(how, tiles, tile, slot, draws, shared.best, mine);
    });
    mine = block_join(mine, Scans{{NOTHING, NOTHING}}, shared.warp_scans);
    if (phase == SCAN) {
      if (thread == 0) {
        parts[split] = mine;
        *arrived = 0;
      }
      return;
    }
    parts = shared.parts;
    if (thread == 0) *parts = mine;
    block_sync();
  }

  if (thread < 32) judge(how, row, parts, splits, shared.verdict);
  block_sync();
  float sum = measure<T, S>(how, tiles, shared, [&](auto body) { stream(tiles, body); });
  sum = block_join(sum, 0.0f, shared.warp_sums);
  if (phase == DECIDE) {
    if (thread == 0) {
      sums[split] = sum;
      memory_fence();
      shared.last = atomic_add(arrived, 1) == splits - 1;
      memory_fence();
    }
    block_sync();
    if (!shared.last || thread >= 32) return;
    sum = 0.0f;
    for (int i = thread; i < splits; i += 32) sum += fresh(sums + i);
    sum = warp_join(sum);
  }
  if (thread == 0) decide(how, row, shared.verdict, sum);
}

template <int T, int S>
const char* launch_as(const Selection& how, void* stream) {
  const Plan& plan = how.plan;
  if (plan.cluster > 0)
    return run(resident<T, S>, how.rows * plan.cluster, 1, plan.cluster, plan.shared_bytes, stream,
               how);
  for (Phase phase : {SCAN, DECIDE}) {
    const bool whole = plan.splits == 1;
    const char* error = run(streaming<T, S>, how.rows, plan.splits, 0, plan.shared_bytes, stream,
                            how, whole ? WHOLE : phase);
    if (whole || error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace

const char* describe(int index, Device* device) { return query(index, device); }

const char* launch(const Selection& how, void* stream) {
  if (how.rows == 0) return nullptr;
  const Dtype teacher = how.model[0].dtype, student = how.model[1].dtype;
  if (teacher != student) return launch_as<ANY, ANY>(how, stream);
  if (teacher == FLOAT32) return launch_as<FLOAT32, FLOAT32>(how, stream);
  if (teacher == BFLOAT16) return launch_as<BFLOAT16, BFLOAT16>(how, stream);
  return launch_as<FLOAT16, FLOAT16>(how, stream);
}

}  // namespace cuda
}  // namespace switchkd
