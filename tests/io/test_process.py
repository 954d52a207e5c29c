"""The helper process: what it answers, and that a hang, a death, a memory limit or a fork costs one
answer at most. Its two users' tests (sandbox, symbolic) attack it further."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minirl.errors import UserError
from minirl.io.process import Helper

REFUSAL = "the helper {}; see the tests"


def prepare() -> Callable[[Any], Any]:
    """Runs in the process: answers a question by what it asks for."""

    def answer(question: Any) -> Any:
        match question:
            case {"sleep": seconds}:
                time.sleep(seconds)
            case {"bytes": size}:
                return len(bytes(size))
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
        return question

    return answer


def refuse() -> Callable[[Any], Any]:
    raise RuntimeError("not today")


@pytest.fixture
def helper() -> Iterator[Helper]:
    helper = Helper(f"{__name__}:prepare", "json", REFUSAL, memory_bytes=1 << 30)
    yield helper
    helper.close()


def test_questions_are_answered_by_one_process(helper: Helper) -> None:
    assert helper.pid is None, "it starts with the first question"
    assert helper.ask({"a": [1, None, "\ud800"]}, 5.0) == {"a": [1, None, "\ud800"]}
    first = helper.pid
    assert helper.ask("again", 5.0) == "again"
    assert helper.pid == first
    assert first != os.getpid()


def test_a_late_answer_is_never_given_to_the_next_question(helper: Helper) -> None:
    helper.start()
    first = helper.pid
    assert first is not None
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        helper.ask({"sleep": 60}, 0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert helper.ask("next", 5.0) == "next"
    assert helper.pid != first


def test_a_process_that_dies_is_replaced(helper: Helper) -> None:
    with pytest.raises(EOFError, match="the process ended"):
        helper.ask("die", 5.0)
    assert helper.ask("next", 5.0) == "next"


@pytest.mark.skipif(not Path("/proc").exists(), reason="the limit is Linux's")
def test_its_memory_is_limited(helper: Helper) -> None:
    assert helper.ask({"bytes": 1 << 20}, 5.0) == 1 << 20
    with pytest.raises(EOFError):
        helper.ask({"bytes": 2 << 30}, 5.0)


def test_why_there_is_no_process_is_said() -> None:
    with pytest.raises(UserError, match=r"^the helper is not installed; see the tests$"):
        Helper(f"{__name__}:prepare", "no_such_package", REFUSAL).ask("a", 5.0)
    with pytest.raises(UserError, match=r"does not run \(RuntimeError: not today\); see the tests"):
        Helper(f"{__name__}:refuse", "json", REFUSAL).start()


def test_it_ends_with_its_object() -> None:
    other = Helper(f"{__name__}:prepare", "json", REFUSAL)
    other.start()
    pid = other.pid
    assert pid is not None
    del other
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
