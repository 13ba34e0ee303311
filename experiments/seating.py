"""The flags of a hospital's own process, where Flower carries the messages of a federation."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterable

from . import refusals, settings

PATIENCE = 2.0  # a site waits for longer than the coordinator waits for the others


@dataclasses.dataclass(frozen=True)
class Seating:
  """A hospital's own process, with placement=flower."""

  site: int = settings.setting(
    -1,
    "placement=flower: number of this hospital's site, from 0: runs it alone, in its own folder, "
    "which its SuperNode names, too; -1 starts a trial of all on this machine, or takes the number "
    "in a folder that primia-site has made",
  )
  stage_timeout: float = settings.setting(
    600.0,
    "placement=flower: seconds that the coordinator waits for a site before it counts as lost; its "
    "work must fit in",
  )
  sites_dir: str = settings.setting(
    "",
    "placement=flower: where in a trial each site has a folder of its own, site_N, which no other "
    "user can read; empty takes the trial's folder with .sites after its name",
  )
  flower_simulation: bool = settings.setting(
    False,
    "placement=flower, a trial: Flower's simulation engine runs the same apps, in place of a "
    "SuperNode for each site; the sites' programs run beside it. Needs the extra flower-simulation",
  )
  channel_dir: str = settings.setting(
    "",
    "placement=flower with site: an existing folder for the socket by which the SuperNode reaches "
    "this program, where the SuperNode is another user's: of mode 0750, for a group that only that "
    "user is in. Name it as the SuperNode's site-folder; empty is the site's own folder",
  )

  same_user: bool = settings.setting(
    False,
    "placement=flower, a folder that primia-site has made: accept that the SuperNode runs as this "
    "program's user, so that whoever runs the SuperLink can run code that opens the folder and the "
    "images",
  )

  def check(
    self, given: Iterable[str], placement: str, number: int, num_sites: int, is_site: bool
  ) -> None:
    """Refuses flags that do not go together.

    Args:
      given: names of the flags on the command line.
      placement: of the run.
      number: of this process's site; negative for a trial.
      num_sites: of the run.
      is_site: whether this process is one site's.

    Raises:
      ValueError: naming the flag, its value and the cure.
    """
    for name in given:
      if placement != "flower":
        raise ValueError(
          f"{name}={getattr(self, name)} belongs to placement=flower, not to "
          f"placement={placement!r}; leave it out"
        )
    if is_site and not 0 <= number < num_sites:
      raise ValueError(
        f"site={number}; use 0 to {num_sites - 1}, the number of this hospital's site"
      )
    if not 0 < self.stage_timeout < math.inf:
      raise ValueError(f"stage_timeout={self.stage_timeout} must be a positive number of seconds")
    if self.sites_dir:
      refusals.folder("sites_dir", self.sites_dir)
    if self.channel_dir and not pathlib.Path(self.channel_dir).expanduser().is_dir():
      raise ValueError(f"channel_dir={self.channel_dir}: there is no such folder; make it first")
    if self.channel_dir and number < 0:
      raise ValueError(
        f"channel_dir={self.channel_dir}: a trial has a channel in each site's folder; leave it "
        "out, or give --site"
      )

  def check_channel(self, own: pathlib.Path | None) -> None:
    """Refuses a channel in the folder of a hospital: a SuperNode that reaches it runs as the user
    who owns all in the folder.

    Args:
      own: a folder that `primia-site` has made, if this process has one.

    Raises:
      ValueError: unless `same_user` says that this is meant; or it is said where no such folder is.
    """
    if own is None:
      if self.same_user:
        raise ValueError(
          "same_user=True is about a folder that primia-site has made, and this run has none: in a "
          "trial all programs are this user's; leave it out"
        )
      return
    place = own if self.channel is None else self.channel
    if self.same_user or not place.resolve().is_relative_to(own.resolve()):
      return
    raise ValueError(
      f"channel_dir={self.channel_dir!r}: the channel would lie in {own}, and a SuperNode that "
      "reaches it there runs as this user, with whatever code its SuperLink sends; give the "
      "SuperNode a user of its own, and name a folder for the channel that both may enter, as "
      "docs/flower.md says, or accept that with --same_user"
    )

  @property
  def channel(self) -> pathlib.Path | None:
    """The folder of the channel, if it is another than the site's own."""
    return pathlib.Path(self.channel_dir).expanduser() if self.channel_dir else None

  @property
  def patience(self) -> float:
    """Seconds for which a site waits for the coordinator."""
    return PATIENCE * self.stage_timeout


NAMES = tuple(field.name for field in dataclasses.fields(Seating))
