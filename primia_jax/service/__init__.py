"""Encrypted inference between institutions: a model owner that serves, and clinics that ask.

Three roles, three processes, three folders (`folders`), and what they send each other (`inbox`,
`publications`). The dealer writes correlations for both parties and is never online (`supply`). The
model owner serves and a clinic asks (`institutions`), over mutual TLS 1.3 with pinned certificates
(`certificates`, `channel`). `frames` is what crosses, and `sessions` the order in which it does.
`journal` keeps budgets and the audit log, `receipts` finds a server that was put back to an earlier
state, `monitoring` shows numbers. The protocol itself is `mpc.multiprocess`.

Model owner and dealer are semi-honest, and the dealer colludes with nobody. A data owner that
deviates from the protocol can learn weights of the model from the outputs (Lehmkuhl et al., USENIX
Security 2021; Chen et al., CCS 2022). Serve one that need not be trusted by a plan whose `client`
is "checked" (its openings carry the dealer's tags) or "sharing" (it shares its image between two
servers: `helping`, `helped`, `sharing`, `cards`).
"""
