"""The tasks of a recipe: where problems come from and what their verifiers credit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag

from minirl.recipe.base import Frozen, Probability
from minirl.recipe.maths import Gsm8k, Mathqa, Maths, Svamp
from minirl.recipe.methods import Kind
from minirl.recipe.own import OWN, is_own
from minirl.recipe.qa import QA, Bamboogle, HotpotQA, MuSiQue, TwoWikiMultiHopQA


class CountdownCredit(Frozen):
    """Score of a wrong Countdown answer by error kind; a right one scores 1 (TinyZero gives 0.1 to
    the last two)."""

    invalid_equation: Probability = 0.0
    """No answer, or one that is no expression of whole numbers, the allowed operators and brackets.
    """
    wrong_numbers: Probability = 0.0
    """An expression that does not use each given number exactly once."""
    missed_target: Probability = 0.0
    """The right numbers with another value than the target."""


class Countdown(Frozen):
    """Reach a target with each given number exactly once."""

    name: Literal["countdown"]
    """Names this task."""
    source: str = "generate"
    """`generate` makes seeded problems; else a hub id (`Jiayi-Pan/Countdown-Tasks-3to4`) or a local
    file with columns `nums, target`."""
    numbers: tuple[PositiveInt, ...] = (3, 4)
    """How many numbers a generated problem has: one of these, evenly."""
    high: PositiveInt = 99
    """Generated numbers lie between 1 and this."""
    target_high: PositiveInt = 99
    """Generated targets lie between 1 and this."""
    operators: str = "+-*/"
    """The operators that generated solutions use and the prompt allows."""
    train: PositiveInt = 4096
    """How many training problems to make or take."""
    held_out: PositiveInt = 200
    """How many problems are kept for evaluation; disjoint from training as multisets of numbers +
    target."""
    credit: CountdownCredit = CountdownCredit()
    """Partial credit by error kind."""


class FunctionCallingCredit(Frozen):
    """Score of a wrong function call by error kind; a right one scores 1."""

    format: Probability = 0.0
    """No call that can be read."""
    tool: Probability = 0.0
    """Calls of other tools than the right ones, or too few or too many."""
    parameter: Probability = 0.0
    """The right tools with a wrong parameter name or value."""


class FunctionCalling(Frozen):
    """Call the right tools with the right arguments; rows in the xLAM schema (`query, tools,
    answers`)."""

    name: Literal["function_calling"]
    """Names this task."""
    source: str = "Salesforce/xlam-function-calling-60k"
    """A hub id, or a local JSON, JSONL or Parquet file with the columns `query, tools, answers`."""
    train: PositiveInt = 48_000
    """Most rows to train on."""
    held_out: PositiveInt = 200
    """How many rows are kept for evaluation; no query of theirs is trained on."""
    max_tools: PositiveInt = 20
    """Rows that offer more tools than this are left out and counted."""
    credit: FunctionCallingCredit = FunctionCallingCredit()
    """Partial credit by error kind."""


class Own(Frozen):
    """One's own task: made by a function in a file, or handed over in Python."""

    name: str
    """`my_file.py:my_task`, a function that returns a `minirl.Task`; the file is looked for in the
    recipe's folder. `own`: the task of `minirl.train(recipe, folder, task=Task(...))`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The arguments of the function; it gets `seed`, the recipe's, besides, if it takes one."""


def name(task: Any) -> str | None:
    """Of a task, in the words of a recipe or as a part of one; "own" for all own ones."""
    found = task.get("name") if isinstance(task, Mapping) else getattr(task, "name", None)
    return OWN if isinstance(found, str) and is_own(found) else found


Task = Annotated[
    Annotated[Countdown, Tag("countdown")]
    | Annotated[FunctionCalling, Tag("function_calling")]
    | Annotated[Own, Tag(OWN)]
    | Annotated[Gsm8k, Tag("gsm8k")]
    | Annotated[Svamp, Tag("svamp")]
    | Annotated[Mathqa, Tag("mathqa")]
    | Annotated[HotpotQA, Tag("hotpotqa")]
    | Annotated[MuSiQue, Tag("musique")]
    | Annotated[TwoWikiMultiHopQA, Tag("2wikimultihopqa")]
    | Annotated[Bamboogle, Tag("bamboogle")],
    Discriminator(name),
]


def kind_of(task: Task) -> Kind | None:
    """How a task is played, which decides the methods that can play it; None for one's own, whose
    file is not read yet."""
    if isinstance(task, Own):
        return None
    if isinstance(task, QA):
        return "search"
    return "calls" if isinstance(task, Maths) and task.chain == "calls" else "text"
