// Signed sums of ChaCha20 keystreams, the CPU form of prng.mask_sum: an XLA foreign function compiled on first use.
//
// keys uint32[..., P, 8], signs int32[..., P], nonce uint32[..., 3] -> uint32[..., N] or uint64[..., N]; the leading
// dimensions are vmap's. The order of words is that of prng.bits: a tile is TILE blocks side by side, word-major.
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ffi.h"

enum { TILE = 128, TILE_BYTES = 64 * TILE, UNIT = 8 };  // UNIT: tiles that a thread takes at a time
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef uint32_t Vec __attribute__((vector_size(4 * LANES)));  // one state word of LANES blocks

typedef struct {
  const uint32_t *keys, *nonce;
  const int32_t* signs;
  uint8_t* out;
  int64_t peers, row_bytes, units_per_row, units;
  bool wide;
  atomic_long next, done, owners;
} Job;

static inline Vec rotate(Vec x, int n) { return (x << n) | (x >> (32 - n)); }

#define QUARTER(a, b, c, d)                     \
  x[a] += x[b], x[d] = rotate(x[d] ^ x[a], 16), \
  x[c] += x[d], x[b] = rotate(x[b] ^ x[c], 12), \
  x[a] += x[b], x[d] = rotate(x[d] ^ x[a], 8),  \
  x[c] += x[d], x[b] = rotate(x[b] ^ x[c], 7)

// The blocks counter to counter + LANES - 1 (RFC 8439, section 2.3), word by word.
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

// One tile: the sum over peers of sign * keystream, of which the caller keeps the first `bytes`.
static void tile(const Job* job, const uint32_t* keys, const int32_t* signs, const uint32_t* nonce, int64_t index,
                 int64_t bytes, void* out) {
  const int64_t columns = bytes / (job->wide ? 8 : 4);  // a short tile has word 0 of its first blocks only
  const int num_blocks = columns < TILE ? columns : TILE;
  memset(out, 0, TILE_BYTES);
  for (int64_t p = 0; p < job->peers; p++) {
    if (signs[p] == 0) continue;
    const uint32_t sign = signs[p];
    const uint64_t wide_sign = (int64_t)signs[p];
    for (int b = 0; b < num_blocks; b += LANES) {
      uint32_t x[16][LANES];
      blocks(keys + 8 * p, nonce, index * TILE + b, x);
      if (job->wide) {
        for (int w = 0; w < 8; w++) {
          uint64_t* sum = (uint64_t*)out + w * TILE + b;
          for (int l = 0; l < LANES; l++) sum[l] += wide_sign * (x[w][l] | (uint64_t)x[w + 8][l] << 32);
        }
      } else {
        for (int w = 0; w < 16; w++) {
          uint32_t* sum = (uint32_t*)out + w * TILE + b;
          for (int l = 0; l < LANES; l++) sum[l] += sign * x[w][l];
        }
      }
    }
  }
}

// Takes units until none is left. Runs on the caller and on XLA's threads; whoever leaves last frees the job, since a
// thread may first come to it after the caller has returned.
static void work(void* data) {
  Job* job = data;
  for (long unit; (unit = atomic_fetch_add(&job->next, 1)) < job->units; atomic_fetch_add(&job->done, 1)) {
    const int64_t row = unit / job->units_per_row, first = unit % job->units_per_row * UNIT;
    uint8_t* out = job->out + row * job->row_bytes;
    for (int64_t t = first; t < first + UNIT && t * TILE_BYTES < job->row_bytes; t++) {
      const int64_t left = job->row_bytes - t * TILE_BYTES;
      uint64_t spare[TILE_BYTES / 8];
      tile(job, job->keys + row * job->peers * 8, job->signs + row * job->peers, job->nonce + row * 3, t, left,
           left < TILE_BYTES ? (void*)spare : out + t * TILE_BYTES);
      if (left < TILE_BYTES) memcpy(out + t * TILE_BYTES, spare, left);
    }
  }
  if (atomic_fetch_sub(&job->owners, 1) == 1) free(job);
}

XLA_FFI_Error* primia_mask_sum(XLA_FFI_CallFrame* frame) {
  if (primia_metadata(frame)) return NULL;
  const XLA_FFI_Buffer *keys = frame->args.args[0], *signs = frame->args.args[1], *nonce = frame->args.args[2];
  const XLA_FFI_Buffer* out = frame->rets.rets[0];
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < out->rank; i++) rows *= out->dims[i];
  Job* job = calloc(1, sizeof(Job));
  if (!job) abort();
  job->wide = out->dtype == XLA_FFI_DataType_U64;
  job->keys = keys->data, job->signs = signs->data, job->nonce = nonce->data, job->out = out->data;
  job->peers = signs->dims[signs->rank - 1];
  job->row_bytes = out->dims[out->rank - 1] * (job->wide ? 8 : 4);
  job->units_per_row = (job->row_bytes + UNIT * TILE_BYTES - 1) / (UNIT * TILE_BYTES);
  job->units = rows * job->units_per_row;
  atomic_init(&job->owners, 2);  // this function, and its own call of work

  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args count = {.struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
                                              .ctx = frame->ctx, .num_threads = &threads};
  XLA_FFI_Error* error = frame->api->XLA_FFI_ThreadPool_NumThreads(&count);
  for (int64_t i = 1; !error && i < threads && i < job->units; i++) {
    XLA_FFI_ThreadPool_Schedule_Args task = {.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE,
                                             .ctx = frame->ctx, .task = work, .data = job};
    atomic_fetch_add(&job->owners, 1);
    error = frame->api->XLA_FFI_ThreadPool_Schedule(&task);
    if (error) atomic_fetch_sub(&job->owners, 1);
  }
  if (error) {  // no pool: the caller does it all
    XLA_FFI_Error_Destroy_Args destroy = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
    frame->api->XLA_FFI_Error_Destroy(&destroy);
  }
  work(job);
  while (atomic_load(&job->done) < job->units) sched_yield();
  if (atomic_fetch_sub(&job->owners, 1) == 1) free(job);
  return NULL;
}
