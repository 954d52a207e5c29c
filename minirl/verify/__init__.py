"""Verifiers: pure functions from a gold answer and a text to a Verdict.

Invariant: a verifier accepts its own gold answer, never executes text, never hangs, and never
raises on any text.
"""
