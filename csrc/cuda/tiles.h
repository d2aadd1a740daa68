// Tiles of a pair of rows, from global to shared memory, byte for byte: a row may begin anywhere.
#pragma once

#include "../noise.h"
#include "../rowwise.h"
#include "device.h"

namespace switchkd {
namespace cuda {

constexpr int ANY = -1;  // of types: known when the kernel runs

struct alignas(16) Floats4 {
  float x[4];
};
struct alignas(8) Words2 {
  uint32_t x[2];
};

SWITCHKD_DEVICE float widened(uint32_t half_word, int dtype) {
  if (dtype == BFLOAT16) return as_float(half_word << 16);
  return half_to_float(static_cast<uint16_t>(half_word));
}

SWITCHKD_DEVICE float load_logit(const void* data, int64_t at, int dtype) {
  if (dtype == FLOAT32) return static_cast<const float*>(data)[at];
  return widened(static_cast<const uint16_t*>(data)[at], dtype);
}

// A tile of one model in shared memory; DTYPE may be ANY.
template <int DTYPE>
struct View {
  const char* at;  // its first logit
  int dtype;
  bool aligned;  // whether each quad is, and can be loaded in one piece

  SWITCHKD_DEVICE void load(int quad, float z[QUAD]) const {
    const int type = DTYPE == ANY ? dtype : DTYPE;
    if (type == FLOAT32) {
      const char* from = at + quad * (QUAD * 4);
      if (aligned) {
        const Floats4 all = *reinterpret_cast<const Floats4*>(from);
        for (int i = 0; i < QUAD; ++i) z[i] = all.x[i];
      } else {
        for (int i = 0; i < QUAD; ++i) z[i] = reinterpret_cast<const float*>(from)[i];
      }
    } else {
      const char* from = at + quad * (QUAD * 2);
      if (aligned) {
        const Words2 all = *reinterpret_cast<const Words2*>(from);
        for (int i = 0; i < QUAD; ++i) z[i] = widened(all.x[i / 2] >> (i % 2 * 16) & 0xFFFF, type);
      } else {
        for (int i = 0; i < QUAD; ++i)
          z[i] = widened(reinterpret_cast<const uint16_t*>(from)[i], type);
      }
    }
  }
};

// Bytes [begin, end) of a row: whole lines of 16 bytes, which come at once. What a tile has before
// and behind them comes entry by entry.
struct Lines {
  int begin, end;
};

// One model's row.
struct Rows {
  const char* row;  // byte 0
  char* shared;     // slot 0
  int dtype, size, phase, bytes;  // of an entry, behind a multiple of 16, of the real vocabulary

  SWITCHKD_DEVICE char* slot(int index) const {
    return shared + index * (TILE * size + 16) + phase;  // slot_bytes
  }
  SWITCHKD_DEVICE Lines lines(int begin, int end) const {  // with what is shared with other tiles
    int first = begin - (phase + begin) % 16, last = end + (-(phase + end) & 15);
    if (first < 0) first += 16;
    if (last > bytes) last -= 16;
    return {first, last > first ? last : first};
  }
  SWITCHKD_DEVICE void copy_entry(int token, char* to) const {
    const bool real = token * size < bytes;
    if (size == 4) {
      *reinterpret_cast<uint32_t*>(to) =
          real ? reinterpret_cast<const uint32_t*>(row)[token] : 0xFF800000u;
    } else {
      const uint16_t lowest = dtype == BFLOAT16 ? 0xFF80 : 0xFC00;  // -inf
      *reinterpret_cast<uint16_t*>(to) =
          real ? reinterpret_cast<const uint16_t*>(row)[token] : lowest;
    }
  }
};

// A slice of both rows, tile by tile.
struct Tiles {
  Rows model[2];
  int begin, end;  // tokens
  int count;       // tiles

  SWITCHKD_DEVICE Tiles(const Selection& how, int64_t row, int index, char* shared) {
    const int vocab = static_cast<int>(how.vocab), slice = static_cast<int>(how.plan.slice);
    begin = static_cast<int>(min(int64_t{index} * slice, how.vocab));
    end = vocab - begin < slice ? vocab : begin + slice;
    count = (end - begin + TILE - 1) / TILE;
    SWITCHKD_UNROLL
    for (int m = 0; m < 2; ++m) {
      const Model& from = how.model[m];
      const int size = from.dtype == FLOAT32 ? 4 : 2;
      const char* data = static_cast<const char*>(from.logits) + row * from.stride * size;
      const int phase = static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16);
      model[m] = {data, shared, from.dtype, size, phase, vocab * size};
      shared += how.plan.teacher_bytes;
    }
  }

  SWITCHKD_DEVICE int first(int tile) const { return begin + tile * TILE; }
  SWITCHKD_DEVICE int tokens(int tile) const {
    return end - first(tile) < TILE ? end - first(tile) : TILE;
  }
  SWITCHKD_DEVICE int quads(int tile) const { return (tokens(tile) + QUAD - 1) / QUAD; }
  SWITCHKD_DEVICE Lines lines(int m, int tile) const {
    const int size = model[m].size;
    return model[m].lines(first(tile) * size, (first(tile) + tokens(tile)) * size);
  }
  SWITCHKD_DEVICE char* place(int m, int tile, int slot, int byte) const {
    return model[m].slot(slot) + (byte - first(tile) * model[m].size);
  }

  // What no line brings of a tile: up to 15 bytes at either end of a row, or 30 in all, and -inf to
  // the end of its last quad. By all threads, of which there are more than such entries.
  SWITCHKD_DEVICE void copy_edges(int m, int tile, int slot) const {
    const Rows& from = model[m];
    const Lines whole = lines(m, tile);
    const int start = first(tile), stop = start + QUAD * quads(tile);
    const int head = whole.begin == whole.end ? start : whole.begin / from.size;
    const int tail = whole.begin == whole.end ? start : whole.end / from.size;
    const int before = start + thread_index(), behind = tail + thread_index();
    if (before < head) from.copy_entry(before, place(m, tile, slot, before * from.size));
    if (behind < stop) from.copy_entry(behind, place(m, tile, slot, behind * from.size));
  }

  template <int DTYPE>
  SWITCHKD_DEVICE View<DTYPE> view(int m, int slot) const {
    const Rows& rows = model[m];
    const int size = DTYPE == ANY ? rows.size : DTYPE == FLOAT32 ? 4 : 2;
    return {rows.slot(slot), rows.dtype, rows.phase % (QUAD * size) == 0};
  }
};

// ------------------------------------------------------------------------------- streamed rows

// A tile, by all threads; there, for each, once it has waited for its part.
SWITCHKD_DEVICE void stream_tile(const Tiles& tiles, int tile, int slot) {
  SWITCHKD_UNROLL
  for (int m = 0; m < 2; ++m) {
    const Lines whole = tiles.lines(m, tile);
    const char* from = tiles.model[m].row + whole.begin;
    char* to = tiles.place(m, tile, slot, whole.begin);
    for (int i = 16 * thread_index(); i < whole.end - whole.begin; i += 16 * THREADS)
      async_copy(to + i, from + i);
    tiles.copy_edges(m, tile, slot);
  }
}

// body(tile, slot) for each tile in turn, the next STREAM_SLOTS - 1 on their way meanwhile.
template <class Body>
SWITCHKD_DEVICE void stream(const Tiles& tiles, Body body) {
  for (int tile = 1 - STREAM_SLOTS; tile < tiles.count; ++tile) {
    if (tile >= 0) {
      async_wait<STREAM_SLOTS - 2>();
      block_sync();  // all of the tile is there, and no thread reads the one before it any more
    }
    const int next = tile + STREAM_SLOTS - 1;
    if (next < tiles.count) stream_tile(tiles, next, next % STREAM_SLOTS);
    async_commit();
    if (tile >= 0) body(tile, tile % STREAM_SLOTS);
  }
  block_sync();  // the slots are free
}

// ------------------------------------------------------------------------------- resident rows

#if defined(SWITCHKD_CLUSTERS)

// Starts the copies of every tile to a slot of its own. By one thread, the one that made the
// barriers, one for each tile.
SWITCHKD_DEVICE void fetch(const Tiles& tiles, Barrier* ready) {
  for (int tile = 0; tile < tiles.count; ++tile) barrier_start(ready + tile);
  barriers_ready();
  for (int tile = 0; tile < tiles.count; ++tile) {
    const Lines whole[2] = {tiles.lines(0, tile), tiles.lines(1, tile)};
    const int bytes[2] = {whole[0].end - whole[0].begin, whole[1].end - whole[1].begin};
    barrier_expect(ready + tile, bytes[0] + bytes[1]);
    SWITCHKD_UNROLL
    for (int m = 0; m < 2; ++m) {
      if (bytes[m] == 0) continue;
      bulk_copy(tiles.place(m, tile, tile, whole[m].begin), tiles.model[m].row + whole[m].begin,
                bytes[m], ready + tile);
    }
  }
}

#endif

}  // namespace cuda
}  // namespace switchkd
