"""Encrypted inference between institutions: a model owner that serves, and clinics that ask.

Three roles, three processes, three folders (`folders`), and what they send each other (`inbox`,
`publications`). The dealer writes correlations for both parties and is never online (`supply`). The
model owner serves and a clinic asks (`institutions`), over mutual TLS 1.3 with pinned certificates
(`certificates`, `channel`). `frames` is what crosses, and `sessions` the order in which it does.
`journal` keeps budgets and the audit log, `monitoring` shows numbers. The protocol itself is
`mpc.apart`.

Both parties are semi-honest and the dealer colludes with neither. A data owner that deviates from
the protocol can learn weights of the model from the outputs (Lehmkuhl et al., USENIX Security 2021;
Chen et al., CCS 2022). Two ways stop it: plans with client="checked", whose openings carry the
dealer's tags, and `helping` with `sharing`, where the clinic is no party but shares its image
between two servers. Without either, serve only clinics that are trusted to follow the protocol.
"""
