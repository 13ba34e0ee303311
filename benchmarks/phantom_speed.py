"""Measures how many images per second the built-in phantom draws.

python -m benchmarks.phantom_speed --size=64
"""

from absl import app, flags

from benchmarks import measuring
from primia_jax.data import phantom

_SIZE = flags.DEFINE_integer(
  "size", 64, "Height and width in pixels.", lower_bound=phantom.MIN_SIZE
)
_IMAGES = flags.DEFINE_integer("images", 512, "Images per repeat.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measured repeats, after a warm-up.", lower_bound=1)

_TARGETS = {64: 500}


def main(_):
  draw = measuring.timed(lambda: phantom.phantom(_IMAGES.value, size=_SIZE.value).images)
  costs = measuring.alternate({"phantom": draw}, _REPEATS.value)["phantom"]
  speeds = [_IMAGES.value / cost.seconds for cost in costs]
  by_cpu = round(_IMAGES.value / min(cost.cpu for cost in costs))
  name = f"phantom: {_SIZE.value} px"
  target = _TARGETS.get(_SIZE.value)
  measuring.say(name, speeds, "images/s", target, at_least=True, images_per_cpu_second=by_cpu)


if __name__ == "__main__":
  app.run(main)
