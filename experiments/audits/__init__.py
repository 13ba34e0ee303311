"""The parts of a privacy audit. Each is a function of a finished run that returns a `parts.Part`:
what it showed, in words, evidence and pictures. `audit_privacy` runs them and writes the report.
"""
