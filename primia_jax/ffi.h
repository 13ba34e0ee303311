// What XLA asks of a foreign function before it calls it for work.
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include "xla/ffi/api/c_api.h"

// Whether a call only asks which version of the interface the function was compiled for; if so, answers it.
static inline bool primia_metadata(XLA_FFI_CallFrame* frame) {
  if (!frame->extension_start || frame->extension_start->type != XLA_FFI_Extension_Metadata) return false;
  XLA_FFI_Metadata* metadata = ((XLA_FFI_Metadata_Extension*)frame->extension_start)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  return true;
}
