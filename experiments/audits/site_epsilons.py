"""What canary sites in the run's own mechanism prove of epsilon, for privacy of whole sites."""

from __future__ import annotations

import jax

from primia_jax.attacks import one_run, site_canaries
from primia_jax.attacks.evidence import Evidence
from primia_jax.privacy import accounting
from primia_jax.privacy.plan import SiteLevel

from .context import Context
from .parts import Part

_WEAKER = 16  # by which the control's noise is divided
_ATTACK = "one-run f-DP audit, canary sites"
REMADE = (
  "The plan was made again from the run's settings, and run anew by this audit's code. So the "
  "mechanism is tested, and not what the run itself drew and sent, nor the code that made it."
)


def proved(context: Context, title: str, made: SiteLevel, weaker: SiteLevel) -> Part:
  """Audits the plan of whole sites.

  Args:
    context: of the run.
    title: of the part.
    made: the run's plan.
    weaker: the same with 1/16 of the noise, as a control.
  """
  config, total = context.config, context.effort.canaries
  rounds, num_sites = config.training.rounds, config.sites_in_round
  family = site_canaries.ledgers(made, rounds, total)[1]
  guesses = one_run.enough_guesses(family, total)  # fixed before anything is seen
  key = jax.random.key(context.effort.audit_seed)
  context.note("empirical epsilon, canary sites")
  right = site_canaries.judge(
    site_canaries.watch(made, rounds, num_sites)(key, total), made, rounds, guesses
  )
  context.note("empirical epsilon, control")
  seen = site_canaries.watch(weaker, rounds, num_sites)(key, total)
  wrong = site_canaries.judge(seen, made, rounds, guesses)  # against the run's own claim
  measure = f"epsilon proved at 95 %, of {right.claim:.3g} claimed"
  of_control = wrong.summed if wrong.alone is None else wrong.alone
  control = Evidence(f"a mechanism with 1/{_WEAKER} of the noise", _ATTACK, "", measure, of_control)
  found = {f"honest server, the sum of {num_sites} sites": right.summed}
  if right.alone is not None:
    found = {"honest server, each site's noised update": right.alone, **found}
  evidence = [
    Evidence(
      threat, _ATTACK, "the run's mechanism", measure, value, control=control,
      note="below the claim" if value < right.claim else "ABOVE THE CLAIM",
      occurs="each" not in threat or not config.aggregation.is_secure,
    )
    for threat, value in found.items()
  ]  # fmt: skip
  evidence.append(evidence[-1]._replace(threat="the final model only", value=right.final, note=""))
  failures = [
    f"the ledger claims epsilon {right.claim:.3g}, and canary sites prove {one.value:.3g}"
    for one in evidence[:-1]
    if one.value >= right.claim
  ]
  context.note("empirical epsilon, how many sites one run would need")
  fewest = site_canaries.fewest_canaries(made, rounds)
  claimed, family = site_canaries.ledgers(made, rounds, num_sites)  # at the run's own delta
  most = one_run.f_dp_bound(family, num_sites, num_sites, num_sites)
  needs = f"{fewest:,} sites" if fewest <= 2**14 else f"more than {2**14:,} sites"
  own = accounting.epsilon(claimed)
  caught = "exceeds" if of_control > right.claim else "does not exceed"
  together = (
    "Sites make their noise together, so that only sums are private. " if made.noise else ""
  )
  text = (
    REMADE,
    f"{total:,} canary sites, each among {num_sites} sites that send zero, send an update of ten "
    f"times the clip in all of {rounds} rounds, by coins of their own; the run's own clip and "
    f"noise treat it. {together}An attacker guessed {guesses} coins and was right "
    f"{right.summed_right} times from the sums"
    + (f", {right.alone_right} times from single updates" if right.alone_right is not None else "")
    + f" (Mahloujifar et al. 2025). So many guesses prove {right.limit:.3g} at most. The control "
    f"has 1/{_WEAKER} of the noise and {caught} the claim. All of this is at delta "
    f"{right.delta:.3g}, where the ledger claims {right.claim:.3g}; at the run's own delta, "
    f"{claimed.delta:.3g}, it claims {own:.3g}.",
    f"Rounds are run again for each canary, since one run has as many canaries as sites: of "
    f"{num_sites}, all guessed right, it would prove {most:.3g} of {own:.3g} at most. Only with "
    f"{needs} could a run's own sites refute its claim. That no more is proved says nothing of "
    "other attacks.",
  )
  return Part(title, text, tuple(evidence), tuple(failures))
