// Depthwise convolutions, channels last: the CPU form of `depthwise`, all taps in one pass over the images.
//
// images float32[..., H, W, C], kernel float32[..., kh, kw, C]; the leading dimensions of images are those of kernels
// times a batch. Geometry is the attribute int64[5]: strides (2), padding before the first row and column, and
// whether the result is the gradient of the images instead of the convolution.
#include "pool.h"

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { TILE = 6 };  // results that share each tap's load
typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4)));

// What one coordinate of the result sees: taps first, first + tap_step, ... and where their values lie.
typedef struct {
  int64_t first, count, source;
} Seen;

typedef struct {
  const float *x, *w;
  float* out;
  Seen *rows, *columns;
  int64_t width, channels, kernel_width, out_height, out_width;  // of x, w and the result
  int64_t images, image_size, kernel_size;                       // images for each kernel
  int64_t tap_step[2], source_step, same, apart;  // results that are `same` apart see the same taps, `apart` further
} Job;

static const int64_t* geometry_of(const XLA_FFI_CallFrame* frame) {
  return ((const XLA_FFI_Array*)frame->attrs.attrs[0])->data;  // the only attribute
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static Seen seen(int64_t at, int64_t size, int64_t taps, int64_t stride, int64_t low, bool transposed) {
  Seen s;
  if (!transposed) {
    s.first = most(0, low - at * stride);
    s.count = least(taps, size + low - at * stride) - s.first;
    s.source = at * stride - low + s.first;
  } else {  // of the taps at + low - stride * source
    const int64_t start = at + low, least_tap = most(0, start - (size - 1) * stride);
    s.first = least_tap + ((start - least_tap) % stride + stride) % stride;
    s.count = s.first > least(taps - 1, start) ? 0 : (least(taps - 1, start) - s.first) / stride + 1;
    s.source = s.count ? (start - s.first) / stride : 0;
  }
  if (s.count < 0) s.count = 0;
  return s;
}

// `tile` results of LANES channels; tile and taps (along a row) are constants of each call.
__attribute__((always_inline)) static inline void results(const Job* job, const float* x, const float* w, float* out,
                                                          int64_t rows, const int taps, const int tile) {
  const int64_t c = job->channels, further = job->apart * c, down = job->source_step * job->width * c;
  const int64_t next = job->source_step * c, tap = job->tap_step[1] * c, tap_row = job->tap_step[0] * job->kernel_width * c;
  Vec sum[TILE] = {};
  for (int64_t i = 0; i < rows; i++, x += down, w += tap_row)
    for (int j = 0; j < taps; j++) {
      const Vec by = *(const Vec*)(w + j * tap);
      for (int p = 0; p < tile; p++) sum[p] += *(const Vec*)(x + j * next + p * further) * by;
    }
  for (int p = 0; p < tile; p++) *(Vec*)(out + p * job->same * c) = sum[p];
}

static void of_row(const Job* job, const float* x, const float* w, float* out, Seen row, int64_t k, bool is_tile) {
  const Seen column = job->columns[k];
#define OF(taps)                                                          \
  case taps:                                                              \
    if (is_tile) results(job, x, w, out, row.count, taps, TILE);          \
    else results(job, x, w, out, row.count, taps, 1);                     \
    break
  switch (column.count) {
    OF(0);
    OF(1);
    OF(2);
    OF(3);
    OF(4);
    OF(5);
    default:
      if (is_tile) results(job, x, w, out, row.count, column.count, TILE);
      else results(job, x, w, out, row.count, column.count, 1);
  }
#undef OF
}

static void convolve(const void* data, int64_t unit) {
  const Job* job = data;
  const int64_t c = job->channels, n = unit / job->out_height, h = unit % job->out_height;
  const Seen row = job->rows[h];
  const float *x = job->x + n * job->image_size + row.source * job->width * c, *kernel = job->w + n / job->images * job->kernel_size;
  float* out = job->out + unit * job->out_width * c;
  const float* w = kernel + row.first * job->kernel_width * c;
  int64_t o = 0;
  for (; o + LANES <= c; o += LANES)
    for (int64_t phase = 0; phase < job->same; phase++)
      for (int64_t k = phase, step; k < job->out_width; k += step * job->same) {
        const Seen s = job->columns[k];
        const int64_t last = k + (TILE - 1) * job->same;
        const bool is_tile = last < job->out_width && job->columns[last].first == s.first && job->columns[last].count == s.count;
        of_row(job, x + s.source * c + o, w + s.first * c + o, out + k * c + o, row, k, is_tile);
        step = is_tile ? TILE : 1;
      }
  for (int64_t k = 0; o < c && k < job->out_width; k++) {  // the last channels, too few for a vector
    const Seen s = job->columns[k];
    for (int64_t l = o; l < c; l++) {
      float sum = 0;
      for (int64_t i = 0; i < row.count; i++)
        for (int64_t j = 0; j < s.count; j++)
          sum += x[((i * job->width + j) * job->source_step + s.source) * c + l] *
                 w[(i * job->tap_step[0] * job->kernel_width + j * job->tap_step[1] + s.first) * c + l];
      out[k * c + l] = sum;
    }
  }
}

static Seen* all_seen(int64_t count, int64_t size, int64_t taps, int64_t stride, int64_t low, bool transposed) {
  Seen* all = malloc((count + 1) * sizeof(Seen));
  if (!all) abort();
  for (int64_t i = 0; i < count; i++) all[i] = seen(i, size, taps, stride, low, transposed);
  return all;
}

// The convolution of images x, or the gradient of the images from that of the result, x.
XLA_FFI_Error* primia_depthwise(XLA_FFI_CallFrame* frame) {
  if (primia_metadata(frame)) return NULL;
  const XLA_FFI_Buffer *x = frame->args.args[0], *w = frame->args.args[1], *out = frame->rets.rets[0];
  const int64_t *g = geometry_of(frame), *sizes = x->dims + x->rank - 3, *taps = w->dims + w->rank - 3;
  const int64_t* made = out->dims + out->rank - 3;
  const bool transposed = g[4];
  Job job = {.x = x->data, .w = w->data, .out = out->data, .width = sizes[1], .channels = sizes[2]};
  job.kernel_width = taps[1], job.out_height = made[0], job.out_width = made[1];
  job.rows = all_seen(made[0], sizes[0], taps[0], g[0], g[2], transposed);
  job.columns = all_seen(made[1], sizes[1], taps[1], g[1], g[3], transposed);
  job.image_size = sizes[0] * sizes[1] * sizes[2], job.kernel_size = taps[0] * taps[1] * taps[2];
  const int64_t images = primia_rows(x, 3), kernels = primia_rows(w, 3);
  job.images = kernels ? most(1, images / kernels) : 1;
  for (int a = 0; a < 2; a++) job.tap_step[a] = transposed ? g[a] : 1;
  job.source_step = transposed ? -1 : 1;
  job.same = transposed ? g[1] : 1, job.apart = transposed ? 1 : g[1];
  if (job.channels) primia_run(frame, convolve, &job, sizeof job, images * made[0]);
  free(job.rows), free(job.columns);
  return NULL;
}

typedef struct {
  const float *x, *g;
  float* out;
  int64_t height, width, channels, g_height, g_width, taps[2], strides[2], low[2];
} Gradient;

// A row of taps from a row of g and one of x, for columns from `from` to `to`; taps is a constant of each call.
__attribute__((always_inline)) static inline void tap_row(const Gradient* job, const float* x, const float* g, float* out,
                                                          int64_t from, int64_t to, const int taps) {
  const int64_t c = job->channels, step = job->strides[1] * c;
  Vec one[8] = {}, two[8] = {};
  int64_t k = from;
  for (; k + 1 < to; k += 2) {
    const Vec a = *(const Vec*)(g + k * c), b = *(const Vec*)(g + (k + 1) * c);
    for (int j = 0; j < taps; j++) {
      one[j] += a * *(const Vec*)(x + k * step + j * c);
      two[j] += b * *(const Vec*)(x + (k + 1) * step + j * c);
    }
  }
  if (k < to)
    for (int j = 0; j < taps; j++) one[j] += *(const Vec*)(g + k * c) * *(const Vec*)(x + k * step + j * c);
  for (int j = 0; j < taps; j++) *(Vec*)(out + j * c) += one[j] + two[j];
}

// Columns of g at which a tap lies inside the image.
static void inside(const Gradient* job, int64_t tap, int64_t* from, int64_t* to) {
  const int64_t s = job->strides[1], shift = job->low[1] - tap;
  *from = shift > 0 ? (shift + s - 1) / s : 0;
  *to = least(job->g_width, job->width + shift > 0 ? (job->width + shift - 1) / s + 1 : 0);
  if (*to < *from) *to = *from;
}

// One tap of LANES channels, or of the fewer last ones, for columns from `from` to `to`.
static void one_tap(const Gradient* job, const float* x, const float* g, float* out, int64_t from, int64_t to, bool is_whole,
                    int64_t channels) {
  const int64_t c = job->channels, step = job->strides[1] * c;
  if (is_whole) {
    Vec sum = {};
    for (int64_t k = from; k < to; k++) sum += *(const Vec*)(g + k * c) * *(const Vec*)(x + k * step);
    *(Vec*)out += sum;
  } else {
    for (int64_t k = from; k < to; k++)
      for (int64_t l = 0; l < channels; l++) out[l] += x[k * step + l] * g[k * c + l];
  }
}

static void gradient(const void* data, int64_t n) {
  const Gradient* job = data;
  const int64_t c = job->channels, kw = job->taps[1];
  const float *x = job->x + n * job->height * job->width * c, *g = job->g + n * job->g_height * job->g_width * c;
  float* out = job->out + n * job->taps[0] * kw * c;
  memset(out, 0, job->taps[0] * kw * c * sizeof(float));
  int64_t first = 0, last = job->g_width, from, to;  // where all taps lie inside
  for (int64_t j = 0; j < kw; j++) inside(job, j, &from, &to), first = most(first, from), last = least(last, to);
  if (last < first || (kw != 3 && kw != 5)) last = first = job->g_width;
  for (int64_t h = 0; h < job->g_height; h++, g += job->g_width * c)
    for (int64_t o = 0; o < c; o += LANES) {
      const bool is_whole = o + LANES <= c;
      const int64_t begin = is_whole ? first : job->g_width, end = is_whole ? last : job->g_width;
      for (int64_t i = 0; i < job->taps[0]; i++) {
        const int64_t y = h * job->strides[0] - job->low[0] + i;
        if (y < 0 || y >= job->height) continue;
        const float* row = x + (y * job->width - job->low[1]) * c + o;
        float* sum = out + i * kw * c + o;
        if (begin < end && kw == 3) tap_row(job, row, g + o, sum, begin, end, 3);
        if (begin < end && kw == 5) tap_row(job, row, g + o, sum, begin, end, 5);
        for (int64_t j = 0; j < kw; j++) {
          inside(job, j, &from, &to);
          one_tap(job, row + j * c, g + o, sum + j * c, from, least(begin, to), is_whole, c - o);
          one_tap(job, row + j * c, g + o, sum + j * c, most(end, from), to, is_whole, c - o);
        }
      }
    }
}

// The gradient of the kernel [..., kh, kw, C] for each image, from images x and the gradient of the result, g.
XLA_FFI_Error* primia_depthwise_kernel(XLA_FFI_CallFrame* frame) {
  if (primia_metadata(frame)) return NULL;
  const XLA_FFI_Buffer *x = frame->args.args[0], *g = frame->args.args[1], *out = frame->rets.rets[0];
  const int64_t *geometry = geometry_of(frame), *sizes = x->dims + x->rank - 3, *given = g->dims + g->rank - 3;
  Gradient job = {.x = x->data, .g = g->data, .out = out->data, .height = sizes[0], .width = sizes[1], .channels = sizes[2]};
  job.g_height = given[0], job.g_width = given[1];
  for (int a = 0; a < 2; a++)
    job.taps[a] = out->dims[out->rank - 3 + a], job.strides[a] = geometry[a], job.low[a] = geometry[2 + a];
  primia_run(frame, gradient, &job, sizeof job, primia_rows(x, 3));
  return NULL;
}
