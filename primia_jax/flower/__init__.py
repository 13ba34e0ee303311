"""Flower as the carrier between institutions: its messages become those of `secagg` and back.

A hospital's SuperNode starts `bridging.app` as a process for each message; it hands the message to
the hospital's own long-lived process through `channel`, and returns the answer. The coordinator's
SuperLink starts `coordinating.app`, once a run. Only these two import Flower. The folder `app` is
what `flwr run` sends to them: the names of both, and no code of ours.

Who learns what: Flower's TLS hides everything from the network. Its node authentication guards the
hospitals' interface of a SuperLink and no other, and a SuperNode runs any app that its SuperLink
sends: `docs/flower.md` says what must be closed. Under that assumption, whoever runs the SuperLink
sees what the coordinator sees (`secagg.protocol`).
"""
