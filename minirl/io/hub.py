"""Whether the model and data hub can be had right now.

Invariant: the question costs a bounded time, whatever the network does (name look-ups included),
and is asked once a process.
"""

from __future__ import annotations

import http.client
import os
import threading
import urllib.error
import urllib.request

_answered: dict[str, bool] = {}


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT where it is set, else the public hub's; no slash at the
    end."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def offline() -> bool:
    """Whether the user has forbidden the hub (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE, as
    huggingface_hub reads them)."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def hub_answers(timeout_s: float = 3.0) -> bool:
    """Whether the hub replies within `timeout_s`; False when the user has forbidden it. Remembered
    for each address, never raises."""
    if offline():
        return False
    url = endpoint()
    if url not in _answered:
        _answered[url] = _probe(url, timeout_s)
    return _answered[url]


def _probe(url: str, timeout_s: float) -> bool:
    replies: list[bool] = []
    # A socket's timeout bounds neither the look-up of a name nor a server that drips bytes; not
    # waiting for a thread bounds both.
    thread = threading.Thread(target=lambda: replies.append(_replies(url, timeout_s)), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return bool(replies and replies[0])


def _replies(url: str, timeout_s: float) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500  # a refusal is an answer; a gateway's error is not
    except (OSError, http.client.HTTPException, ValueError):
        return False
