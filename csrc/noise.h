// The C++ twin of noise.py: Philox, and Gumbel noise from its words.
#pragma once

#include "scalar.h"

namespace switchkd {
inline namespace SWITCHKD_CAPABILITY {

// Philox4x32-10 (Salmon et al. 2011, Random123). W holds a 32-bit word in 64 bits, or many of them;
// what lies above bit 31 is ignored on the way in and undefined on the way out.
SWITCHKD_HOST_DEVICE uint64_t wide_product(uint64_t a, uint32_t b) {
  return static_cast<uint64_t>(static_cast<uint32_t>(a)) * b;
}

template <class W>
struct Words {
  W w0, w1, w2, w3;
};

template <class W>
SWITCHKD_HOST_DEVICE Words<W> philox(uint64_t seed, Words<W> c) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  SWITCHKD_UNROLL
  for (int round = 0; round < 10; ++round) {
    W a = wide_product(c.w0, 0xD2511F53u), b = wide_product(c.w2, 0xCD9E8D57u);
    c.w0 = (b >> 32) ^ c.w1 ^ static_cast<uint64_t>(key0);
    c.w2 = (a >> 32) ^ c.w3 ^ static_cast<uint64_t>(key1);
    c.w1 = b;
    c.w3 = a;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// Where a row's noise is in the field: token v takes word v % 4 of block v / 4.
struct Counter {
  uint64_t seed;
  uint32_t position, low, high;
};

SWITCHKD_HOST_DEVICE Counter counter_of(uint64_t seed, int64_t position, int64_t id, int stream) {
  uint64_t sequence = static_cast<uint64_t>(id);
  return {seed, static_cast<uint32_t>(position), static_cast<uint32_t>(sequence),
          static_cast<uint32_t>(sequence >> 32) | static_cast<uint32_t>(stream) << 24};
}

// -log(-log1p(-u)), u = min((float(word) + 1/2) 2^-32, 1 - 2^-24); falls as the word rises.
SWITCHKD_HOST_DEVICE float gumbel(uint32_t word) {
  float u = (static_cast<float>(word) + 0.5f) * 2.3283064365386963e-10f;
  return -::logf(-::log1pf(-min(u, 0.999999940395355f)));
}

constexpr float GUMBEL_MAX = 22.9f;  // of word 0: 22.874

// gumbel(word) <= -log u <= GUMBEL_AT - GUMBEL_PER_BIT * float(bits of float(word >> 1)): the bits
// of a float, read as an integer, are 2^23 (127 + log2) from below, by at most 0.087 in log2. One
// bit of the word is given up because few processors convert unsigned words.
constexpr float GUMBEL_PER_BIT = 1.1920928955078125e-07f * LN2, GUMBEL_AT = 158.0f * LN2 + 1e-4f;

}  // namespace SWITCHKD_CAPABILITY
}  // namespace switchkd
