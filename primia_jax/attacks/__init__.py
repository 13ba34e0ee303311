"""Attacks on what crosses a trust boundary, and how well they do, beside a positive control.

Each attack is `init` and `step`, pure functions of arrays. An attack that fails proves little: it
is reported with a control in which the same attack succeeds (`evidence.Evidence`).
"""
