"""Fourier transforms and what commonly surrounds them, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from mpc_reference import OWNERS, check_plan, gates, normal

from primia_jax import mpc
from primia_jax.mpc.gates.elementwise import TRUNCATE

pytestmark = pytest.mark.usefixtures("x64")
ONE, X = np.ones((), np.float32), normal(0, 4, 6)


def both(z):
  return jnp.real(z), jnp.imag(z)


def test_transforms():
  fft = jnp.fft

  def fn(w, x):
    y = x * w
    z = fft.fft(y)
    return (
      both(z), both(fft.fft2(y)), both(fft.ifft(z)), both(fft.rfft(y)), fft.irfft(fft.rfft(y)),
      fft.irfft2(fft.rfft2(y)), both(fft.rfft2(y)), both(fft.fft(y, axis=0)), fft.irfft(z, 10),
    )  # fmt: skip

  check_plan(fn, (ONE, X), 5e-4)


def test_what_surrounds_a_transform():
  """Masks, shifts, coils: k-space to magnitude."""
  mask = (np.arange(24).reshape(4, 6) % 3 > 0).astype(np.complex64)
  coils = (normal(1, 3, 4, 6) + 1j * normal(2, 3, 4, 6)).astype(np.complex64)

  def fn(w, x):
    k = jnp.fft.fftshift(jnp.fft.fft2(x * w)) * mask
    y = jnp.fft.ifft2(jnp.fft.ifftshift(k))
    combined = (coils * y[None]).sum(0) - jnp.conj(y) / 2 + y * y
    picked = jnp.where(mask.real > 0, y, 0)
    return (
      jnp.abs(y),
      both(combined),
      both(-picked[:, ::2].T),
      both(y / (1 + 1j)),
      both((x * w).astype(np.complex64) + 1j * y),
    )

  check_plan(fn, (ONE, X), 2e-3)


def test_a_transform_of_what_one_party_holds_costs_nothing():
  fn = lambda w, x: both(jnp.fft.fft(x) * jnp.fft.fft(w))
  plan = check_plan(fn, (normal(3, 4, 6), X), 2e-3)
  assert set(gates(plan)) <= {TRUNCATE}


@pytest.mark.parametrize(
  ("fn", "reason"),
  [
    (lambda w, x: jnp.fft.fft(x * w), "a complex number; take jnp.real"),
    (lambda w, x: jnp.exp(jnp.fft.fft(x * w)), "exp of complex numbers.*jnp.real"),
    (lambda w, x: jnp.angle(jnp.fft.fft(x * w)), "atan2 of a secret.*interp"),
    (lambda w, x: jnp.real(1 / jnp.fft.fft(x * w)), "div by a complex secret.*conjugate"),
  ],
)
def test_the_rest_is_refused_by_name(fn, reason):
  with pytest.raises(NotImplementedError, match=reason) as refusal:
    mpc.plan(fn, OWNERS, (ONE, X), mpc.Config(64, 16))
  assert "mpc_complex_test.py:" in str(refusal.value)
