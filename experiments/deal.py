"""Dealer: deals the correlations that encrypted inferences use up, before any image exists.

  primia-deal --folder=dealer --model=chest-1 --clinic=hospital-a --images=100

It reads the model owner's plan and tag, and nothing else. It writes for two parties:
dealer/outbox/model_owner and dealer/outbox/hospital-a. Move each into its receiver's
inbox/dealer, encrypted and never both by the same hands: anyone with both learns images and
weights. The outbox is filled up to --images, so the same call goes on after a stop.

With --checked the clinic's part is held back. The model owner then draws a share at random
(primia-publish --check_dealer), and --open opens these to it, destroys them and every seed, and
releases the rest to the clinic.
"""

import dataclasses
import time

from absl import flags

from primia_jax.mpc.pricing import bytes_text
from primia_jax.service import certificates, inbox, publications, supply

from . import progress, running, settings
from .folders import alone, role_folder


@dataclasses.dataclass(frozen=True)
class Deal:
  """For whom, and how much."""

  folder: str = settings.setting("", "the dealer's own folder, of mode 0700")
  model: str = settings.setting("", "name of the publication")
  clinic: str = settings.setting(
    "", "name of the clinic, as in its certificate; of the helper, where clinics share their images"
  )
  images: int = settings.setting(0, "number of images for which the outbox will hold correlations")
  disk_gb: float = settings.setting(
    0.0, "most that the dealer's folder may take, in 10^9 bytes; 0 takes what the disk has free"
  )
  checked: bool = settings.setting(
    False, "hold the clinic's part back until the model owner has checked a share of what is dealt"
  )
  open: bool = settings.setting(False, "answer the model owner's challenge, and release the rest")


settings.define_flags(Deal)
flags.adopt_module_key_flags(settings)


def main() -> None:
  s = settings.from_flags(Deal)
  folder = role_folder(s.folder)
  place = publications.model_folder(folder, s.model)
  certificates.check_name(s.clinic, "clinic")
  if s.open and (s.images or s.checked):
    raise ValueError("open with images or checked: do one after the other")
  if not s.open and s.images <= 0:
    raise ValueError(f"images={s.images}; use a positive number")
  if not 0 <= s.disk_gb < float("inf"):
    raise ValueError(f"disk_gb={s.disk_gb}; use a number of gigabytes, or 0")
  own = folder / certificates.CERTIFICATE
  if own.is_file() and certificates.name(own.read_bytes()) == s.clinic:
    raise ValueError(
      f"clinic={s.clinic} is this dealer itself, which would see both sides' numbers; the dealer "
      "must be another institution than model owner, clinics and helper"
    )
  if (place / "publication").exists():
    raise ValueError(
      f"folder={s.folder} holds the publication of {s.model}, so it is a party's; the dealer needs "
      "a folder, and an institution, of its own"
    )
  inbox.collect(folder, inbox.DEALER)
  if missing := [name for name in ("plan", "tag") if not (place / name).is_file()]:
    raise FileNotFoundError(
      f"model={s.model}: {place} lacks {' and '.join(missing)}; copy the model owner's "
      f"outbox/dealer into {s.folder}/inbox/model_owner"
    )
  with alone(folder / "lock"):
    if s.open:
      opened, released = supply.release(folder, s.model, s.clinic)
      print(
        f"{opened} inferences are opened to the model owner and destroyed, and no seed is left. "
        f"{released} are released to {s.clinic}."
      )
    else:
      _deal(s, folder)
  outbox = folder / publications.OUTBOX
  for peer in (supply.MODEL_OWNER, s.clinic):
    if not any(path.is_file() for path in (outbox / peer).rglob("*")):
      continue
    print(f"Move {folder}/{publications.OUTBOX}/{peer}/ into the inbox/dealer/ of its receiver.")


def _deal(s: Deal, folder) -> None:
  dealer = supply.dealer(folder, s.model)
  each = publications.images_shape(dealer.plan)[0]
  if s.images % each:
    raise ValueError(
      f"images={s.images}: the plan takes {each} images at a time; use a multiple of {each}"
    )
  count, ready = s.images // each, supply.ready(folder, s.model, s.clinic)
  needed = max(0, count - ready) * supply.inference_bytes(dealer)
  try:
    supply.check_disk(folder, needed, 1e9 * s.disk_gb or float("inf"))
  except ValueError as error:
    raise ValueError(f"images={s.images}, disk_gb={s.disk_gb}: {error}") from error
  print(f"{ready * each} images are dealt for and have not left; {bytes_text(needed)} to be dealt.")
  start, done = time.perf_counter(), [0]
  with progress.closing(
    progress.bar(total=max(0, count - ready) * each, desc=f"dealing {s.model}", unit="image")
  ) as bar:

    def dealt() -> None:
      done[0] += each
      rate = 60 * done[0] / (time.perf_counter() - start)
      bar.set_postfix_str(f"{rate:.1f} images a minute", refresh=False)
      for _ in range(each):
        bar.update()

    supply.top_up(folder, dealer, s.model, s.clinic, count, s.checked, dealt)
  print(f"{s.images} images are dealt for.")


if __name__ == "__main__":
  running.start(main, keeps_small=True)
