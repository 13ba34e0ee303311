// A value that is computed once: an XLA foreign function that does nothing, since its result is its argument's buffer.
//
// XLA:CPU drops optimization barriers before it fuses; it cannot look into, or fuse across, a foreign call.
#include <stddef.h>

#include "xla/ffi/api/c_api.h"

XLA_FFI_Error* primia_barrier(XLA_FFI_CallFrame* frame) {
  if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata* metadata = ((XLA_FFI_Metadata_Extension*)frame->extension_start)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    metadata->traits = 0;
  }
  return NULL;
}
