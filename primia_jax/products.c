// Sums of matrix products, each rounded before it is added: the CPU form of privacy.bookkeeping.rounded_products.
//
// x float32[..., M, P, K], g float32[..., M, P, O], factors float32[..., M] -> sum_m rint(factors[m] x[m]^T g[m]),
// int32[..., K, O], without storing a product. One whose factor is 0 is not looked at. A product is a sum of P terms
// in order; |rounded| must be below 2^31.
#include "pool.h"

#if defined(__AVX512F__)
enum { LANES = 16 };
#define ROWS 6
#elif defined(__AVX2__)
enum { LANES = 8 };
#define ROWS 4
#else
enum { LANES = 4 };
#define ROWS 2
#endif
enum { COLUMNS = 2 };  // vectors: a block of ROWS x COLUMNS of them stays in registers
typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));

typedef struct {
  const float *x, *g, *factors;
  int32_t* total;
  int64_t units, positions, fan_in, features, blocks;  // blocks: of ROWS rows in one total
} Job;

// rows k to k + rows - 1 and columns o to o + COLUMNS * LANES - 1; rows is a constant of each call
__attribute__((always_inline)) static inline void block(const Job* job, const float* x, const float* g,
                                                        const float* factors, int32_t* total, const int rows) {
  const int64_t stride = job->features;
  Ints sum[ROWS][COLUMNS] = {};
  for (int64_t m = 0; m < job->units; m++, x += job->positions * job->fan_in, g += job->positions * stride) {
    if (factors[m] == 0) continue;
    Vec product[ROWS][COLUMNS] = {};
    const float *xp = x, *gp = g;
    for (int64_t p = 0; p < job->positions; p++, xp += job->fan_in, gp += stride) {
      Vec row[COLUMNS];
      for (int c = 0; c < COLUMNS; c++) row[c] = *(const Vec*)(gp + c * LANES);
      for (int r = 0; r < rows; r++)
        for (int c = 0; c < COLUMNS; c++) product[r][c] += xp[r] * row[c];
    }
    for (int r = 0; r < rows; r++)
      for (int c = 0; c < COLUMNS; c++) {
        Vec scaled = product[r][c] * factors[m];
        Ints rounded;
        for (int l = 0; l < LANES; l++) rounded[l] = (int32_t)__builtin_rintf(scaled[l]);
        sum[r][c] += rounded;
      }
  }
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < COLUMNS; c++) *(Ints*)(total + r * stride + c * LANES) = sum[r][c];
}

// one number, at the edges
static void single(const Job* job, const float* x, const float* g, const float* factors, int32_t* total) {
  *total = 0;
  for (int64_t m = 0; m < job->units; m++, x += job->positions * job->fan_in, g += job->positions * job->features) {
    if (factors[m] == 0) continue;
    float product = 0;
    for (int64_t p = 0; p < job->positions; p++) product += x[p * job->fan_in] * g[p * job->features];
    *total += (int32_t)__builtin_rintf(product * factors[m]);
  }
}

static void work(const void* data, int64_t unit) {
  const Job* job = data;
  const int64_t row = unit / job->blocks, first = unit % job->blocks * ROWS;
  const float* x = job->x + row * job->units * job->positions * job->fan_in;
  const float* g = job->g + row * job->units * job->positions * job->features;
  const float* factors = job->factors + row * job->units;
  int32_t* total = job->total + row * job->fan_in * job->features;
  const int64_t last = first + ROWS < job->fan_in ? first + ROWS : job->fan_in;
  int64_t o = 0;
#define OF(rows) case rows: block(job, x + first, g + o, factors, total + first * job->features + o, rows); break
  for (; o + COLUMNS * LANES <= job->features; o += COLUMNS * LANES) switch (last - first) {
      OF(1);
      OF(2);
#if ROWS >= 4
      OF(3);
      OF(4);
#endif
#if ROWS >= 6
      OF(5);
      OF(6);
#endif
    }
#undef OF
  for (int64_t k = first; k < last; k++)
    for (int64_t i = o; i < job->features; i++)
      single(job, x + k, g + i, factors, total + k * job->features + i);
}

XLA_FFI_Error* primia_products(XLA_FFI_CallFrame* frame) {
  if (primia_metadata(frame)) return NULL;
  const XLA_FFI_Buffer *x = frame->args.args[0], *g = frame->args.args[1], *out = frame->rets.rets[0];
  Job job = {.x = x->data, .g = g->data, .factors = ((XLA_FFI_Buffer*)frame->args.args[2])->data, .total = out->data};
  job.units = x->dims[x->rank - 3], job.positions = x->dims[x->rank - 2], job.fan_in = x->dims[x->rank - 1];
  job.features = g->dims[g->rank - 1];
  job.blocks = (job.fan_in + ROWS - 1) / ROWS;
  primia_run(frame, work, &job, sizeof job, primia_rows(out, 2) * job.blocks);
  return NULL;
}
