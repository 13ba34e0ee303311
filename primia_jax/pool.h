// Work that is cut into units, done by the caller and XLA's threads together.
#pragma once

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ffi.h"

typedef struct {
  void (*unit)(const void* job, int64_t unit);
  int64_t units;
  atomic_long next, done, owners;
  _Alignas(16) char job[];
} Pool;

// Takes units until none is left. Whoever leaves last frees the pool, since a thread may first come to it after the
// caller has returned.
static void primia_take(void* data) {
  Pool* pool = data;
  for (long unit; (unit = atomic_fetch_add(&pool->next, 1)) < pool->units; atomic_fetch_add(&pool->done, 1))
    pool->unit(pool->job, unit);
  if (atomic_fetch_sub(&pool->owners, 1) == 1) free(pool);
}

// Calls unit(job, 0), ..., unit(job, units - 1), each once and in any order, and returns when all are done.
static void primia_run(XLA_FFI_CallFrame* frame, void (*unit)(const void*, int64_t), const void* job, size_t size,
                       int64_t units) {
  Pool* pool = calloc(1, sizeof(Pool) + size);
  if (!pool) abort();
  memcpy(pool->job, job, size);
  pool->unit = unit, pool->units = units;
  atomic_init(&pool->owners, 2);  // this function, and its own call of primia_take
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args count = {.struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
                                              .ctx = frame->ctx, .num_threads = &threads};
  XLA_FFI_Error* error = frame->api->XLA_FFI_ThreadPool_NumThreads(&count);
  for (int64_t i = 1; !error && i < threads && i < units; i++) {
    XLA_FFI_ThreadPool_Schedule_Args task = {.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE,
                                             .ctx = frame->ctx, .task = primia_take, .data = pool};
    atomic_fetch_add(&pool->owners, 1);
    error = frame->api->XLA_FFI_ThreadPool_Schedule(&task);
    if (error) atomic_fetch_sub(&pool->owners, 1);
  }
  if (error) {  // no pool: the caller does it all
    XLA_FFI_Error_Destroy_Args destroy = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
    frame->api->XLA_FFI_Error_Destroy(&destroy);
  }
  primia_take(pool);
  while (atomic_load(&pool->done) < units) sched_yield();
  if (atomic_fetch_sub(&pool->owners, 1) == 1) free(pool);
}

// The product of all dimensions but the last `kept`.
static inline int64_t primia_rows(const XLA_FFI_Buffer* buffer, int64_t kept) {
  int64_t rows = 1;
  for (int64_t i = 0; i + kept < buffer->rank; i++) rows *= buffer->dims[i];
  return rows;
}
