"""What a task is: problems, a verifier, and demonstrations where it has them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from random import Random

from minirl.episode import Problem, Verdict
from minirl.io.rows import SUFFIXES
from minirl.recipe.maths import Maths
from minirl.recipe.methods import Kind
from minirl.recipe.qa import QA


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What SFT imitates on one problem: a right answer, and where the task has them a failed
    attempt with a reflection on it.

    settled: the reflection arrives at the answer; else it gives up, and no retry is shown after it.
    """

    answer: str
    attempt: str = ""
    reflection: str = ""
    settled: bool = True


@dataclass(frozen=True, slots=True)
class Task:
    """verify: (problem, text of an attempt) -> Verdict, pure. stop: strings that end an attempt
    (they stay in it).

    verify_answer: (problem, the answer alone, no words around it) -> Verdict: for method stepwise;
    None where it cannot play the task.
    demonstrate: (problem, rng) -> Demonstration; None where the task has no gold solutions to show.
    notes: what the user should know once, e.g. how many rows were left out.
    """

    name: str
    train: Sequence[Problem]
    held_out: Sequence[Problem]
    verify: Callable[[Problem, str], Verdict]
    stop: tuple[str, ...] = ()
    demonstrate: Callable[[Problem, Random], Demonstration] | None = None
    notes: tuple[str, ...] = ()
    verify_answer: Callable[[Problem, str], Verdict] | None = None

    @property
    def kind(self) -> Kind:
        """How it is played, which decides the methods that can play it (see `MethodFacts`)."""
        return "text" if self.verify_answer is None else "calls"


def note_left_out(source: str, left_out: Counter[str]) -> tuple[str, ...]:
    """The notes of a task on rows that it left out. left_out: how many, by the reason, which goes
    on after "they"."""
    return tuple(
        f"{source}: rows left out because they {reason}: {count}"
        for reason, count in sorted(left_out.items())
        if count
    )


def divides_source(config: Maths | QA) -> bool:
    """Whether training and held-out questions are parts of the same rows: of one file, or one
    split."""
    one_file = Path(config.source).suffix.lower() in SUFFIXES
    one_source = config.test_source in (None, "", config.source)
    return one_source and (one_file or config.split == config.test_split)


def fingerprint(task: Task) -> str:
    """A digest of the problems in their order: a file of problems that was edited, or another task
    made in Python, has another one.

    Not of what a search task searches besides.
    """
    digest = blake2b(digest_size=16)
    for part in (task.train, task.held_out):
        for p in part:
            fields = (p.id, p.prompt, p.answer, p.solution, p.system, p.tools)
            digest.update(json.dumps(fields, sort_keys=True, default=str).encode() + b"\n")
        digest.update(b"held out\n")
    return digest.hexdigest()
