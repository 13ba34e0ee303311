"""The programs as commands, such as `primia-train`: each runs its module as `python -m` does."""

import runpy
from collections.abc import Callable


def _program(module: str) -> Callable[[], object]:
  return lambda: runpy.run_module(f"{__package__}.{module}", run_name="__main__", alter_sys=True)


train, pooled = _program("train_federated"), _program("train_pooled")
search = _program("search")
evaluate, infer = _program("evaluate"), _program("infer_encrypted")
account, plot = _program("account"), _program("plot")
audit, score = _program("audit_privacy"), _program("evaluate_encrypted")
page, node = _program("clinic_page"), _program("dicom_node")
certificate, publish, deal = _program("certificate"), _program("publish"), _program("deal")
serve, quickstart = _program("serve_encrypted"), _program("quickstart")
site, ask = _program("site"), _program("ask_servers")
case_study = _program("case_study")
