// Matrix products and convolutions of 64-bit integers modulo 2^64 by AVX2, which multiplies 32-bit numbers only.
//
// x uint64[N, *space, G, C], w int32[G, blocks, terms, planes, 8], geometry int64[4, axes] -> uint64[N, *space', G, O].
// With x = low + 2^32 high, x w is low w, exact in 64 bits, plus 2^32 (high w), of which 32 bits count. With one plane
// all numbers are signed and x comes as its signed halves; with two, w is unsigned and has a high half too. A block of
// w is 8 columns of all terms, in the order 0 4 1 5 2 6 3 7, so that those in even places are the first four.
// Geometry, over N and space: sizes of the result, its steps in x, sizes of the window, its steps in x. Terms are
// windows times numbers that lie side by side in x. Leading dimensions are vmap's; an operand's may be 1.
#include <stdint.h>

#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>

enum { ROWS = 4, COLUMNS = 8, CHUNK = 64 };  // CHUNK: positions of a unit of work
#define ALL_ROWS(each) each(0) each(1) each(2) each(3)

typedef struct {
  const XLA_FFI_Buffer *x, *w, *out;
  const int64_t *sizes, *steps, *taps, *tap_steps;  // [axes] each
  int64_t lead, axes, positions, chunks, groups, blocks, terms, planes, windows, columns;
} Job;

static int64_t product(const int64_t* sizes, int64_t count) {
  int64_t all = 1;
  for (int64_t i = 0; i < count; i++) all *= sizes[i];
  return all;
}

// Where the index-th of an array's elements lies in another one.
static int64_t place(int64_t index, const int64_t* sizes, const int64_t* steps, int64_t axes) {
  int64_t sum = 0;
  for (int64_t a = axes; a-- > 0; index /= sizes[a]) sum += index % sizes[a] * steps[a];
  return sum;
}

// An operand's elements for one index of the result's leading dimensions.
static const void* row(const XLA_FFI_Buffer* operand, const Job* job, int64_t index, int64_t bytes) {
  int64_t offset = 0, step = product(operand->dims + job->lead, operand->rank - job->lead) * bytes;
  for (int64_t a = job->lead; a-- > 0; index /= job->out->dims[a], step *= operand->dims[a])
    if (operand->dims[a] > 1) offset += index % job->out->dims[a] * step;
  return (const char*)operand->data + offset;
}

// Sixteen registers hold twelve sums and four operands, if the compiler adds each product at once: NOW ends a step.
#define NOW(v) __asm__("" : "+x"(v))
#define START(r)               \
  const uint32_t* x##r = x[r]; \
  __m256i even##r = {}, odd##r = {}, high##r = {};
#define ADD(sum, bits, product)            \
  p = product;                             \
  NOW(p);                                  \
  sum = _mm256_add_epi##bits(sum, p);      \
  NOW(sum);
#define LOW(r, multiply)                   \
  b = _mm256_set1_epi32(x##r[2 * i]);      \
  ADD(even##r, 64, multiply(b, first))     \
  ADD(odd##r, 64, multiply(b, second))
#define HIGH(r, w) ADD(high##r, 32, _mm256_mullo_epi32(b, w))
#define SIGNED(r)                          \
  LOW(r, _mm256_mul_epi32)                 \
  b = _mm256_set1_epi32(x##r[2 * i + 1]);  \
  HIGH(r, first)
#define UNSIGNED(r)                        \
  LOW(r, _mm256_mul_epu32)                 \
  HIGH(r, _mm256_loadu_si256((const void*)(w + COLUMNS))) \
  b = _mm256_set1_epi32(x##r[2 * i + 1]);  \
  HIGH(r, first)
#define STORE(r)                                                                                        \
  sum[r][0] = _mm256_add_epi64(sum[r][0], _mm256_add_epi64(even##r, _mm256_slli_epi64(high##r, 32)));   \
  sum[r][1] = _mm256_add_epi64(sum[r][1], _mm256_add_epi64(odd##r, _mm256_and_si256(high##r, upper)));

// Adds `count` terms to a tile of ROWS positions and COLUMNS columns.
#define TILE(name, planes, each)                                                                      \
  __attribute__((target("avx2"), noinline)) static void name(const uint32_t* const* x, const int32_t* w, \
                                                             int64_t count, __m256i sum[ROWS][2]) {   \
    const __m256i upper = _mm256_set1_epi64x(-(1ll << 32));                                           \
    ALL_ROWS(START)                                                                                   \
    for (int64_t i = 0; i < count; i++, w += planes * COLUMNS) {                                      \
      const __m256i first = _mm256_loadu_si256((const void*)w), second = _mm256_srli_epi64(first, 32); \
      __m256i b, p;                                                                                   \
      ALL_ROWS(each)                                                                                  \
    }                                                                                                 \
    ALL_ROWS(STORE)                                                                                   \
  }
TILE(signed_tile, 1, SIGNED)
TILE(unsigned_tile, 2, UNSIGNED)

static void work(const void* data, int64_t unit) {
  const Job* job = data;
  const int64_t block = unit % job->blocks, group = unit / job->blocks % job->groups;
  const int64_t chunk = unit / job->blocks / job->groups % job->chunks;
  const int64_t index = unit / job->blocks / job->groups / job->chunks;
  const int64_t begin = chunk * CHUNK, end = begin + CHUNK < job->positions ? begin + CHUNK : job->positions;
  const int64_t channels = job->x->dims[job->x->rank - 1], run = job->terms / job->windows;
  const int64_t width = job->columns - block * COLUMNS < COLUMNS ? job->columns - block * COLUMNS : COLUMNS;
  const uint64_t* x = (const uint64_t*)row(job->x, job, index, 8) + group * channels;
  const int32_t* w = (const int32_t*)row(job->w, job, index, 4) +
                     (group * job->blocks + block) * job->terms * job->planes * COLUMNS;
  uint64_t* out = (uint64_t*)job->out->data + index * job->positions * job->groups * job->columns;
  for (int64_t first = begin; first < end; first += ROWS) {
    const uint64_t* rows[ROWS];
    uint64_t sum[ROWS][COLUMNS] __attribute__((aligned(32))) = {};
    for (int64_t r = 0; r < ROWS; r++)  // a tile that is not full repeats its first position
      rows[r] = x + place(first + r < end ? first + r : first, job->sizes, job->steps, job->axes);
    for (int64_t t = 0; t < job->windows; t++) {
      const int64_t tap = place(t, job->taps, job->tap_steps, job->axes);
      const uint32_t* halves[ROWS];
      for (int64_t r = 0; r < ROWS; r++) halves[r] = (const uint32_t*)(rows[r] + tap);
      const int32_t* terms = w + t * run * job->planes * COLUMNS;
      (job->planes == 1 ? signed_tile : unsigned_tile)(halves, terms, run, (__m256i(*)[2])sum);
    }
    for (int64_t r = 0; r < ROWS && first + r < end; r++)
      memcpy(out + ((first + r) * job->groups + group) * job->columns + block * COLUMNS, sum[r], 8 * width);
  }
}

XLA_FFI_Error* primia_wide_products(XLA_FFI_CallFrame* frame) {
  if (primia_metadata(frame)) return NULL;
  const XLA_FFI_Buffer *x = frame->args.args[0], *w = frame->args.args[1], *geometry = frame->args.args[2];
  Job job = {.x = x, .w = w, .out = frame->rets.rets[0]};
  const int64_t* kernel = w->dims + w->rank - 5;
  job.axes = geometry->dims[geometry->rank - 1], job.sizes = geometry->data;
  job.steps = job.sizes + job.axes, job.taps = job.steps + job.axes, job.tap_steps = job.taps + job.axes;
  job.lead = w->rank - 5, job.positions = product(job.sizes, job.axes), job.windows = product(job.taps, job.axes);
  job.groups = kernel[0], job.blocks = kernel[1], job.terms = kernel[2], job.planes = kernel[3];
  job.columns = job.out->dims[job.out->rank - 1], job.chunks = (job.positions + CHUNK - 1) / CHUNK;
  const int64_t units = product(job.out->dims, job.lead) * job.chunks * job.groups * job.blocks;
  primia_run(frame, work, &job, sizeof job, units);
  return NULL;
}

// Whether this is the fastest form: AVX-512DQ multiplies 64-bit numbers, and XLA's own loops use it.
int primia_has_wide_products(void) {
  return __builtin_cpu_supports("avx2") && !__builtin_cpu_supports("avx512dq");
}
#else
XLA_FFI_Error* primia_wide_products(XLA_FFI_CallFrame* frame) {
  primia_metadata(frame);
  return NULL;
}

int primia_has_wide_products(void) { return 0; }
#endif
