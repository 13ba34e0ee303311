"""The clinic's own side: what asks a model under encryption, from the machines that a clinic has.

`asking` says what a question and an answer are; `node` receives X-rays from a PACS and sends back
`reports`; `page` is a web page for this machine alone. None of them knows the protocol: a function
asks, which plays all roles in one process, or a session with a model owner's server.
"""
