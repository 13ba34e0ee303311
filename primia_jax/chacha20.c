// Signed sums of ChaCha20 keystreams, the CPU form of prng.mask_sum: an XLA foreign function compiled on first use.
//
// keys uint32[..., P, 8], signs int32[..., P] of 1, -1 and 0, nonce uint32[..., 3] -> uint32[..., N] or uint64[..., N];
// the leading dimensions are vmap's. The order of words is that of prng.bits.
#include "chacha20.h"
#include "pool.h"

enum { UNIT = 8 };  // tiles that a thread takes at a time

typedef struct {
  const uint32_t *keys, *nonce;
  const int32_t* signs;
  uint8_t* out;
  int64_t peers, row_bytes, units_per_row;
  bool wide;
} Job;

// Adds a mask's LANES blocks to a tile at `out`, or subtracts them. The compiler knows `wide` and `minus`: a sign in
// the inner loop costs a fifth of the speed, and AVX2 cannot multiply wide numbers by it.
__attribute__((always_inline)) static inline void add(uint32_t x[16][LANES], const bool wide, const bool minus,
                                                      void* out) {
  for (int w = 0; w < (wide ? 8 : 16); w++)
    for (int l = 0; l < LANES; l++)
      if (wide) {
        const uint64_t v = x[w][l] | (uint64_t)x[w + 8][l] << 32;
        ((uint64_t*)out)[w * TILE + l] += minus ? -v : v;
      } else {
        ((uint32_t*)out)[w * TILE + l] += minus ? -x[w][l] : x[w][l];
      }
}

// One tile: the sum over peers of sign * keystream, of which the caller keeps the first `bytes`.
static void tile(const Job* job, const uint32_t* keys, const int32_t* signs, const uint32_t* nonce, int64_t index,
                 int64_t bytes, void* out) {
  const int64_t size = job->wide ? 8 : 4, columns = bytes / size;  // a short tile has word 0 of its first blocks only
  const int num_blocks = columns < TILE ? columns : TILE;
  memset(out, 0, TILE_BYTES);  // in order, which fetches it faster than the additions would
  for (int64_t p = 0; p < job->peers; p++) {
    if (signs[p] == 0) continue;
    for (int b = 0; b < num_blocks; b += LANES) {
      uint32_t x[16][LANES];
      blocks(keys + 8 * p, nonce, index * TILE + b, x);
      uint8_t* at = (uint8_t*)out + b * size;
      if (job->wide)
        signs[p] < 0 ? add(x, true, true, at) : add(x, true, false, at);
      else
        signs[p] < 0 ? add(x, false, true, at) : add(x, false, false, at);
    }
  }
}

static void work(const void* data, int64_t unit) {
  const Job* job = data;
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

XLA_FFI_Error* primia_mask_sum(XLA_FFI_CallFrame* frame) {
  if (primia_metadata(frame)) return NULL;
  const XLA_FFI_Buffer *keys = frame->args.args[0], *signs = frame->args.args[1], *nonce = frame->args.args[2];
  const XLA_FFI_Buffer* out = frame->rets.rets[0];
  Job job = {.keys = keys->data, .nonce = nonce->data, .signs = signs->data, .out = out->data};
  job.wide = out->dtype == XLA_FFI_DataType_U64;
  job.peers = signs->dims[signs->rank - 1];
  job.row_bytes = out->dims[out->rank - 1] * (job.wide ? 8 : 4);
  job.units_per_row = (job.row_bytes + UNIT * TILE_BYTES - 1) / (UNIT * TILE_BYTES);
  primia_run(frame, work, &job, sizeof job, primia_rows(out, 1) * job.units_per_row);
  return NULL;
}
