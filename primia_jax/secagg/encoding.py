"""Canonical bytes of records: fields in order, little-endian, with lengths; two records have the
same bytes exactly if they are equal. Nothing read from them is ever executed.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import numpy as np


class Source:
  """Reads bytes from the front; raises ValueError where fewer are left than a message announces."""

  def __init__(self, data: memoryview):
    self._data, self._at = data, 0

  def left(self) -> int:
    return len(self._data) - self._at

  def take(self, size: int) -> memoryview:
    if size > self.left():
      raise ValueError(f"malformed message: {size} bytes announced, {self.left()} there")
    self._at += size
    return self._data[self._at - size : self._at]

  def number(self) -> int:
    return struct.unpack("<I", self.take(4))[0]


Put = Callable[[bytes], None]


def _put_number(put: Put, n: int) -> None:
  if not 0 <= n < 2**32:
    raise ValueError(f"{n} in a message; numbers must be in [0, 2^32)")
  put(struct.pack("<I", n))


def _put_bytes(put: Put, data: bytes) -> None:
  _put_number(put, len(data))
  put(data)


def _put_numbers(put: Put, numbers: tuple[int, ...]) -> None:
  _put_number(put, len(numbers))
  for n in numbers:
    _put_number(put, n)


def _put_boxes(put: Put, boxes: dict[int, bytes]) -> None:
  _put_number(put, len(boxes))
  for site in sorted(boxes):
    _put_number(put, site)
    _put_bytes(put, boxes[site])


def _take_boxes(source: Source) -> dict[int, bytes]:
  boxes: dict[int, bytes] = {}
  last = -1
  for _ in range(source.number()):
    site = source.number()
    if site <= last:
      raise ValueError(f"malformed message: site {site} is out of order or repeated")
    boxes[site], last = bytes(source.take(source.number())), site
  return boxes


def _put_vectors(put: Put, vectors: tuple[np.ndarray, ...]) -> None:
  """Each number in as many whole bytes as the largest of its vector needs: k bits if masked."""
  _put_number(put, len(vectors))
  for v in vectors:
    if v.ndim != 1 or v.dtype not in (np.uint32, np.uint64):
      raise ValueError(
        f"{v.dtype}{list(v.shape)} in a message; arrays must be vectors of uint32 or uint64"
      )
    width = _bytes_of(v)
    _put_number(put, v.dtype.itemsize)
    _put_number(put, width)
    words = v.astype(v.dtype.newbyteorder("<"), copy=False)
    data = np.ascontiguousarray(words).view(np.uint8).reshape(-1, v.dtype.itemsize)
    _put_bytes(put, data[:, :width].tobytes())


def _take_vectors(source: Source) -> tuple[np.ndarray, ...]:
  vectors = []
  for _ in range(source.number()):
    itemsize, width, size = source.number(), source.number(), source.number()
    if itemsize not in (4, 8) or not 1 <= width <= itemsize or size % width:
      raise ValueError(
        f"malformed message: {size} bytes are no {itemsize}-byte words in {width} bytes each"
      )
    data = source.take(size)  # before memory is allocated for a size that is only announced
    words = np.zeros((size // width, itemsize), np.uint8)
    words[:, :width] = np.frombuffer(data, np.uint8).reshape(-1, width)
    v = words.reshape(-1).view(f"<u{itemsize}").astype(f"u{itemsize}", copy=False)
    if width != _bytes_of(v):
      raise ValueError(f"malformed message: numbers of {_bytes_of(v)} bytes in {width} each")
    vectors.append(v)
  return tuple(vectors)


def _bytes_of(v: np.ndarray) -> int:
  """The number of bytes that holds any number of a vector; at least one."""
  return max(1, -(-int(v.max(initial=0)).bit_length() // 8))


_CODECS: dict[Any, tuple[Callable[[Put, Any], None], Callable[[Source], Any]]] = {
  int: (_put_number, Source.number),
  bytes: (_put_bytes, lambda source: bytes(source.take(source.number()))),
  tuple[int, ...]: (
    _put_numbers,
    lambda source: tuple(source.number() for _ in range(source.number())),
  ),
  dict[int, bytes]: (_put_boxes, _take_boxes),
  tuple[np.ndarray, ...]: (_put_vectors, _take_vectors),
}


@functools.cache
def _codecs(kind: Any) -> tuple[tuple[Callable[[Put, Any], None], Callable[[Source], Any]], ...]:
  """How each field of a kind of record is put and taken."""
  return tuple(map(_codec, get_type_hints(kind).values()))


def _codec(hint: Any) -> tuple[Callable[[Put, Any], None], Callable[[Source], Any]]:
  if hint in _CODECS:
    return _CODECS[hint]
  kind, _ = get_args(hint)  # tuple[kind, ...]

  def put_records(put: Put, records: tuple[Any, ...]) -> None:
    _put_number(put, len(records))
    for record in records:
      put_fields(put, record)

  return put_records, lambda source: tuple(
    take_fields(source, kind) for _ in range(source.number())
  )


def put_fields(put: Put, record: Any) -> None:
  """Puts a named tuple whose fields are numbers, bytes, vectors, boxes, or tuples of such records.

  Raises:
    ValueError: for a number outside uint32, or an array that is not a vector of uint32 or uint64.
  """
  kind: Any = type(record)
  for (put_field, _), value in zip(_codecs(kind), record, strict=True):
    put_field(put, value)


def take_fields(source: Source, kind: Any) -> Any:
  """The record of this kind that comes next; raises a ValueError if none does."""
  return kind(*[take_field(source) for _, take_field in _codecs(kind)])
