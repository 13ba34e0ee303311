"""Ten hospitals and twenty rounds: two are killed, and come back in the next round."""

import functools
import gc
import tracemalloc

import flower_world
import numpy as np
import pytest
from flower_world import CONFIG, World, charged, expected, quick, records, site

from experiments import settings

SITES, SIZE = 10, 2000
TEN = settings.replace(CONFIG, num_sites=SITES, secagg_threshold=-1, phantom_images=120)
LOST = {3: 4, 7: 6}  # site to the round in which it is killed
# messages of a site; a sum is later where its keys were agreed on in the one before
MEETING, A_SUM, A_LATER, A_RETURN = 3, 5, 3, 2
BEGUN = MEETING + A_SUM + 3 * A_LATER  # before the sum of round 4
AT = {3: BEGUN, 7: BEGUN + A_LATER + A_RETURN + A_SUM}  # with site 3, keys are agreed on anew
WINDOWS = (1, 2, 3, 7, 8, 9, 11, 12, 13, 17, 18, 19)  # the least of three is what stays


def of_secagg():
  """Bytes that the code of `secagg` has allocated and that are still there."""
  gc.collect()
  own = tracemalloc.Filter(True, "*/primia_jax/secagg/*")
  return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([own]).traces)


@pytest.mark.slow
def test_twenty_rounds_of_ten_end_with_two_that_come_back_and_memory_is_flat(tmp_path, monkeypatch):
  """The memory of ten rounds grows where each sum is kept, which shows that this is seen."""
  monkeypatch.setattr(flower_world, "SIZE", SIZE)
  program, kept, sizes = functools.partial(site, config=TEN), [], {}

  def seen(report):
    kept.append(report if report.round < 10 else None)
    if report.round in WINDOWS:
      sizes[report.round] = of_secagg()
    who.append(report.opened.survivors)

  who, world = [], World(SITES, keeps=False)

  def kill(i, at):
    if i in world.restarts and at == AT[i]:
      world.kill(i)

  world.on_say, world.restarts = kill, set(LOST)
  tracemalloc.start()
  try:
    with quick():
      world.run(tmp_path, 20, program, tell=seen)
  finally:
    tracemalloc.stop()
  assert world.errors == {}
  assert [len(sites) for sites in who] == [10] * 4 + [9, 10, 9] + [10] * 13
  for i in range(SITES):
    np.testing.assert_array_equal(world.results[i], world.results[0])
    assert charged(tmp_path, i) == 20
  np.testing.assert_array_equal(world.results[0], expected(records(tmp_path, 0)))
  early, before, after, late = (min(map(sizes.get, WINDOWS[i : i + 3])) for i in (0, 3, 6, 9))
  assert before - early > 4 * 4 * SIZE  # six sums
  assert late - after < 4 * SIZE, sizes
