"""Whether the model and data hub can be reached right now.

Invariant: the question costs a bounded time, whatever the network does, and is asked once a
process.
"""

from __future__ import annotations

import os

_answers: dict[str, bool] = {}


def endpoint() -> str:
    """The hub's address without a slash at the end: HF_ENDPOINT if it is set, else the public
    hub's."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def offline() -> bool:
    """Whether the user has forbidden the hub (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE, as
    huggingface_hub reads them)."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def hub_answers(timeout_s: float = 3.0) -> bool:
    """Whether the hub replies within `timeout_s`; False if the user has forbidden it. Remembered
    for each address; never raises."""
    if offline():
        return False
    url = endpoint()
    if url not in _answers:
        from minirl.io import http

        status = http.head(url, timeout_s)
        _answers[url] = status is not None and status < 500  # a refusal is a reply
    return _answers[url]
