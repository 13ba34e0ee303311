"""What leaves a process by its types: the messages of secure aggregation and of inference.

Host code moves these, and no jaxpr shows it. Each field of each type is listed with what hides it;
`check` fails for a field that is not, or whose type has changed. Whether a field holds what its
type says is for the tests of `secagg.protocol` and `mpc.roles`, not for this list.

  public     no secret: numbers, public keys, digests, signatures, lists of who takes part
  masked     ring elements under the masks of `secagg.masking`, or D = W - B: see `rounds`, `secret`
  sealed     boxes for one recipient, under a key agreed with it
  shares     shares of the keys by which the masks left in a sum are removed: of one of a site's two
             secrets, never of both
  total      the opened sum
  messages   encoded messages of this list
  its own    keys and correlations for the party that takes them; they serve once (`messages.Once`)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from primia_jax.boundary.report import Unmasked
from primia_jax.mpc import messages as mpc
from primia_jax.secagg import messages as secagg

PUBLIC, MASKED, SEALED, SHARES, TOTAL, MESSAGES, ITS_OWN = (
  "public",
  "masked",
  "sealed",
  "shares",
  "total",
  "messages",
  "its own",
)
_FROM_SITE = {"site": PUBLIC, "round": PUBLIC, "signature": PUBLIC}
FIELDS: dict[type, dict[str, str]] = {
  secagg.Advert: _FROM_SITE | dict.fromkeys(("box_key", "mask_key", "commitment"), PUBLIC),
  secagg.Roster: {"round": PUBLIC, "adverts": PUBLIC},
  secagg.Shares: _FROM_SITE | {"boxes": SEALED},
  secagg.Delivery: {"round": PUBLIC, "boxes": SEALED},
  secagg.MaskedInput: _FROM_SITE | {"vectors": MASKED},
  secagg.Survivors: dict.fromkeys(("round", "survivors", "dropouts", "inputs"), PUBLIC),
  secagg.Consent: _FROM_SITE,
  secagg.Consents: {"round": PUBLIC, "signatures": PUBLIC},
  secagg.Answer: _FROM_SITE | {"self_shares": SHARES, "mask_shares": SHARES},
  secagg.Evidence: {"round": PUBLIC, "signature": PUBLIC}
  | dict.fromkeys(("roster", "masked", "answers"), MESSAGES),
  secagg.Hello: dict.fromkeys(("site", "identity", "server", "fresh", "told", "signature"), PUBLIC),
  # what a site tells may be the state of a round, or the weights of classes, which follow from the
  # sums that all were told
  secagg.Start: dict.fromkeys(("site", "round", "state", "sites", "signature"), PUBLIC)
  | {"told": TOTAL},
  secagg.Word: {"site": PUBLIC, "told": TOTAL},
  secagg.Invitation: dict.fromkeys(("identity", "fresh"), PUBLIC),
  secagg.Relayed: {"said": TOTAL},
  secagg.Terms: dict.fromkeys(get_type_hints(secagg.Terms), PUBLIC),
  secagg.Proposal: dict.fromkeys(("site", "round", "terms"), PUBLIC)
  | dict.fromkeys(("advert", "masked"), MESSAGES),
  secagg.Bond: _FROM_SITE,
  secagg.Bonds: {"round": PUBLIC, "signatures": PUBLIC},
  secagg.Together: {"parts": MESSAGES},
  secagg.Recalled: dict.fromkeys(("identity", "fresh", "hellos"), PUBLIC),
  secagg.Returning: dict.fromkeys(("sites", "giver"), PUBLIC),
  secagg.Resumed: {"starts": TOTAL, "state": TOTAL},
  secagg.Ended: dict.fromkeys(("site", "reason"), PUBLIC),
  secagg.Dismissed: {"reason": PUBLIC},
  mpc.Publication: {"publication": PUBLIC, "arrays": MASKED},
  mpc.Question: {"inference": PUBLIC, "arrays": MASKED},
}
ONCE = {mpc.Blind: ITS_OWN, mpc.Correlations: ITS_OWN}
_ARRAYS = ("ndarray", "Operands", "dict[int, typing.Any]")  # such fields must be masked or a total


def check(fields: Mapping[type, Mapping[str, str]] = FIELDS) -> None:
  """Raises `Unmasked` unless every field of every message is listed, and arrays are hidden."""
  for kind in (*get_args(secagg.Message), mpc.Publication, mpc.Question):
    hints: dict[str, Any] = get_type_hints(kind)
    listed = fields.get(kind, {})
    for name, hint in hints.items():
      how = listed.get(name)
      if how is None:
        raise Unmasked(f"{kind.__module__}.{kind.__name__}.{name} leaves its process, unlisted")
      if any(word in str(hint) for word in _ARRAYS) and how not in (MASKED, TOTAL):
        raise Unmasked(f"{kind.__module__}.{kind.__name__}.{name} holds arrays and is {how}")
    if gone := set(listed) - set(hints):
      raise Unmasked(f"{kind.__name__} has no {sorted(gone)} any more; correct the list")
  for once in ONCE:
    if not issubclass(once, mpc.Once):
      raise Unmasked(f"{once.__name__} may be used twice")
