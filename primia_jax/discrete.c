// Integers of a table's law from ChaCha20, the CPU form of privacy.discrete.digits.
//
// keys uint32[..., L, 8], heads uint32[..., 2^m, 2], tails uint32[..., 2^m, 3], shift uint32[...] -> int32[..., N], the
// sum over the L digits of draw << shift (L - 1 - digit). Word w of draw i is word i of prng.bits(key, (0, 0, w)).
#include "chacha20.h"
#include "pool.h"

enum { UNIT = 8 };  // tiles that a thread takes at a time

typedef struct {
  const uint32_t *keys, *heads, *tails, *shift;
  int32_t* out;
  int64_t digits, columns, size, units_per_row;
  int bits;  // of a column's number
} Job;

// Word `index` of a stream.
static uint32_t word(const uint32_t* key, uint32_t stream, int64_t index) {
  const uint32_t nonce[3] = {0, 0, stream};
  uint32_t x[16][LANES];
  blocks(key, nonce, index / TILE_WORDS * TILE + index % TILE, x);
  return x[index % TILE_WORDS / TILE][0];
}

// Whether draw i lies below a column's threshold, where its first word cannot tell.
static bool below(const uint32_t* key, const uint32_t* tail, int64_t i) {
  for (int w = 0; w < 3; w++) {
    const uint32_t bits = word(key, w + 1, i);
    if (bits != tail[w]) return bits < tail[w];
  }
  return false;
}

// One tile: draws first to first + count - 1 of one digit, added to the earlier digits.
static void tile(const uint32_t* key, const uint32_t* heads, const uint32_t* tails, int bits, uint32_t shift,
                 int64_t first, int64_t count, int32_t* out) {
  static const uint32_t nonce[3] = {0, 0, 0};
  uint32_t words[TILE_WORDS];
  const int num_blocks = count < TILE ? count : TILE;  // a short tile has word 0 of its first blocks only
  for (int b = 0; b < num_blocks; b += LANES) {
    uint32_t x[16][LANES];
    blocks(key, nonce, first / TILE_WORDS * TILE + b, x);
    for (int w = 0; w < 16; w++) memcpy(words + w * TILE + b, x[w], sizeof x[w]);
  }
  const uint32_t mask = (UINT32_C(1) << (31 - bits)) - 1;
  uint32_t ties = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint32_t column = words[i] >> (32 - bits), rest = words[i] >> 1 & mask;
    const uint32_t *head = heads + 2 * column, magnitude = rest < head[0] ? column : head[1];
    const uint32_t sign = -(words[i] & 1);
    ties |= rest == head[0];
    out[i] = (int32_t)(((uint32_t)out[i] << shift) + ((magnitude ^ sign) - sign));
  }
  if (!ties) return;
  for (int64_t i = 0; i < count; i++) {
    const uint32_t column = words[i] >> (32 - bits), rest = words[i] >> 1 & mask;
    if (rest != heads[2 * column] || !below(key, tails + 3 * column, first + i)) continue;
    const uint32_t sign = -(words[i] & 1), taken = heads[2 * column + 1];
    out[i] = (int32_t)((uint32_t)out[i] - ((taken ^ sign) - sign) + ((column ^ sign) - sign));
  }
}

static void work(const void* data, int64_t unit) {
  const Job* job = data;
  const int64_t row = unit / job->units_per_row, begin = unit % job->units_per_row * UNIT * TILE_WORDS;
  const int64_t end = begin + UNIT * TILE_WORDS < job->size ? begin + UNIT * TILE_WORDS : job->size;
  int32_t* out = job->out + row * job->size;
  memset(out + begin, 0, 4 * (end - begin));
  for (int64_t first = begin; first < end; first += TILE_WORDS) {
    const int64_t count = end - first < TILE_WORDS ? end - first : TILE_WORDS;
    for (int64_t d = 0; d < job->digits; d++)
      tile(job->keys + (row * job->digits + d) * 8, job->heads + row * job->columns * 2,
           job->tails + row * job->columns * 3, job->bits, job->shift[row], first, count, out + first);
  }
}

XLA_FFI_Error* primia_discrete(XLA_FFI_CallFrame* frame) {
  if (primia_metadata(frame)) return NULL;
  const XLA_FFI_Buffer *keys = frame->args.args[0], *heads = frame->args.args[1];
  const XLA_FFI_Buffer *tails = frame->args.args[2], *shift = frame->args.args[3], *out = frame->rets.rets[0];
  Job job = {.keys = keys->data, .heads = heads->data, .tails = tails->data, .shift = shift->data, .out = out->data};
  job.digits = keys->dims[keys->rank - 2];
  job.columns = heads->dims[heads->rank - 2];
  job.size = out->dims[out->rank - 1];
  job.bits = __builtin_ctzll(job.columns);
  job.units_per_row = (job.size + UNIT * TILE_WORDS - 1) / (UNIT * TILE_WORDS);
  primia_run(frame, work, &job, sizeof job, primia_rows(out, 1) * job.units_per_row);
  return NULL;
}
