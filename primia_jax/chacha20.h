// The ChaCha20 block function (RFC 8439, section 2.3) on several blocks at once, and the order of words of prng.bits.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { TILE = 128, TILE_WORDS = 16 * TILE, TILE_BYTES = 4 * TILE_WORDS };  // a tile is TILE blocks side by side, word-major
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef uint32_t Vec __attribute__((vector_size(4 * LANES)));  // one state word of LANES blocks

__attribute__((always_inline)) static inline Vec rotate(Vec x, const int n) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (n % 8 == 0) {  // whole bytes: one instruction instead of three, where none rotates
    typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));
    Bytes from;
    for (int i = 0; i < 4 * LANES; i++) from[i] = i % 16 / 4 * 4 + (i + 4 - n / 8) % 4;
    return (Vec)_mm256_shuffle_epi8((__m256i)x, (__m256i)from);
  }
#endif
  return (x << n) | (x >> (32 - n));
}

#define QUARTER(a, b, c, d)                     \
  x[a] += x[b], x[d] = rotate(x[d] ^ x[a], 16), \
  x[c] += x[d], x[b] = rotate(x[b] ^ x[c], 12), \
  x[a] += x[b], x[d] = rotate(x[d] ^ x[a], 8),  \
  x[c] += x[d], x[b] = rotate(x[b] ^ x[c], 7)

// The blocks counter to counter + LANES - 1, word by word.
static inline void blocks(const uint32_t* key, const uint32_t* nonce, uint32_t counter, uint32_t out[16][LANES]) {
  const uint32_t words[16] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574, key[0],  key[1],   key[2],   key[3],
                              key[4],     key[5],     key[6],     key[7],     counter, nonce[0], nonce[1], nonce[2]};
  Vec x[16], lane;
  for (int l = 0; l < LANES; l++) lane[l] = l;
  for (int w = 0; w < 16; w++) x[w] = (Vec){} + words[w];
  x[12] += lane;
  for (int round = 0; round < 10; round++) {
    QUARTER(0, 4, 8, 12), QUARTER(1, 5, 9, 13), QUARTER(2, 6, 10, 14), QUARTER(3, 7, 11, 15);
    QUARTER(0, 5, 10, 15), QUARTER(1, 6, 11, 12), QUARTER(2, 7, 8, 13), QUARTER(3, 4, 9, 14);
  }
  for (int w = 0; w < 16; w++) {
    x[w] += words[w];
    if (w == 12) x[w] += lane;
    memcpy(out[w], &x[w], sizeof(Vec));
  }
}
