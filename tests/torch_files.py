"""Writes files as torch.save does, without PyTorch."""

import collections
import pickle
import sys
import types
import zipfile

import numpy as np


class FakeTensor:
  """Pickles like a torch.Tensor that is the given view of a storage."""

  def __init__(self, array, storage=None, offset=0, kind="FloatStorage"):
    self.storage = np.ascontiguousarray(array).ravel() if storage is None else storage
    self.array, self.offset, self.kind = array, offset, kind

  def __reduce__(self):
    torch = sys.modules["torch"]
    strides = tuple(s // self.array.itemsize for s in self.array.strides)
    storage = FakeStorage(self.storage, getattr(torch, self.kind))
    hooks = collections.OrderedDict()
    return torch._utils._rebuild_tensor_v2, (
      storage,
      self.offset,
      self.array.shape,
      strides,
      False,
      hooks,
    )


class FakeStorage:
  def __init__(self, array, kind):
    self.array, self.kind = array, kind


def saving(monkeypatch):
  """torch.save as its two file formats define it, with a stand-in for the module, so that torch is
  not needed.
  """
  torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
  for kind in ("FloatStorage", "HalfStorage", "LongStorage"):
    setattr(torch, kind, type(kind, (), {"__module__": "torch"}))

  def _rebuild_tensor_v2():
    raise AssertionError("only its name is pickled")

  _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = (
    "torch._utils",
    "_rebuild_tensor_v2",
  )
  utils._rebuild_tensor_v2 = _rebuild_tensor_v2
  torch._utils = utils
  monkeypatch.setitem(sys.modules, "torch", torch)
  monkeypatch.setitem(sys.modules, "torch._utils", utils)

  def save(content, path, legacy=False, cut=0):
    storages = {}

    class Pickler(pickle.Pickler):
      def persistent_id(self, obj):
        if not isinstance(obj, FakeStorage):
          return None
        key = str(len(storages)) if all(a is not obj.array for a in storages.values()) else None
        key = key or next(k for k, a in storages.items() if a is obj.array)
        storages[key] = obj.array
        return ("storage", obj.kind, key, "cpu", obj.array.size, *((None,) if legacy else ()))

    def tensors_of(value):
      if isinstance(value, dict):
        return collections.OrderedDict((k, tensors_of(v)) for k, v in value.items())
      if isinstance(value, tuple | list):
        return type(value)(map(tensors_of, value))
      return FakeTensor(value) if isinstance(value, np.ndarray) else value

    tensors = tensors_of(content)
    if legacy:
      with open(path, "wb") as file:
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
        for obj in (0x1950A86A20F9469CFC6C, 1001, system):
          pickle.dump(obj, file, protocol=2)
        Pickler(file, protocol=2).dump(tensors)
        pickle.dump(sorted(storages), file, protocol=2)
        for key in sorted(storages):
          data = storages[key].tobytes()
          file.write(np.int64(storages[key].size).tobytes() + data[: len(data) - cut])
      return
    with zipfile.ZipFile(path, "w") as archive:
      with archive.open("weights/data.pkl", "w") as file:
        Pickler(file, protocol=2).dump(tensors)
      archive.writestr("weights/byteorder", "little")
      for key, array in storages.items():
        data = array.tobytes()
        archive.writestr(f"weights/data/{key}", data[: len(data) - cut])

  return save
