"""Permits gRPC no TLS older than 1.3, which must be said before gRPC is loaded.

gRPC offers no least version of TLS. But no cipher that is permitted here for TLS 1.2 goes with the
certificates' ECDSA keys, so that only TLS 1.3, whose ciphers are not chosen, can succeed.
"""

from __future__ import annotations

import os
import sys

_VARIABLE, _VALUE = "GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES128-GCM-SHA256"


def permit_tls_1_3_only() -> None:
  """Sets what gRPC reads when it is loaded.

  Raises:
    ImportError: it is loaded already, with other ciphers.
  """
  if "grpc" in sys.modules and os.environ.get(_VARIABLE) != _VALUE:
    raise ImportError("import primia_jax.service before grpc, or it could not permit TLS 1.3 only")
  os.environ[_VARIABLE] = _VALUE
