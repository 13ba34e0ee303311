"""What every comparison [public < dealer-known] offers, whichever protocol computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from primia_jax.mpc.dealing import Correlation, Derived, Masks
from primia_jax.mpc.sharing import Wire
from primia_jax.types import Array


class Span(NamedTuple):
  """The bits to compare.

  Attributes:
    low, high: lt = [v' < r'], where v' and r' are bits low to high - 1 of v and r.
    cut: if given, also borrow = [v mod 2^cut < r mod 2^cut]; then 0 = low < cut < high.
  """

  low: int
  high: int
  cut: int | None = None


class Compared(NamedTuple):
  """One party's shares of the answer.

  Attributes:
    lt: [N] uint8, Boolean share of 0 or 1.
    borrow: the same for the borrow, unless the comparison opened it.
    opened_borrow: [N] uint8, public: borrow ^ (the dealer's mask), if the comparison opened it.
  """

  lt: Array
  borrow: Array | None = None
  opened_borrow: Array | None = None


class Comparison(NamedTuple):
  """A protocol for [public < dealer-known]; `Config.comparison` picks one by name.

  Attributes:
    name: "tables" or "fss".
    masks: (span, N) -> the uniform masks that both parties expand from their seeds.
    derive: (span, r [N], both parties' mask shares [2, ...]) -> what the dealer deals, and the mask
      [N] uint8 of the borrow if the comparison opens it, else None.
    evaluate: (span, wire, public v [N], this party's correlation) -> this party's `Compared`.
    opens_borrow: span -> whether the comparison opens the borrow under a mask of its own.
    seed_only: whether the model owner receives a seed and nothing else from the dealer.
  """

  name: str
  masks: Callable[[Span, int], Masks]
  derive: Callable[[Span, Array, dict[str, Array]], tuple[Derived, Array | None]]
  evaluate: Callable[[Span, Wire, Array, Correlation], Compared]
  opens_borrow: Callable[[Span], bool]
  seed_only: bool
