"""The tasks of a recipe: where problems come from and what their verifiers credit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from minirl.recipe.base import Frozen, Probability
from minirl.recipe.maths import Gsm8k, Mathqa, Maths, Svamp
from minirl.recipe.methods import Kind
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
    """A task made in Python: problems and a verifier that are handed to `minirl.train(recipe,
    folder, task=Task(...))`."""

    name: Literal["own"]
    """Names this task."""


Task = Annotated[
    Countdown
    | FunctionCalling
    | Own
    | Gsm8k
    | Svamp
    | Mathqa
    | HotpotQA
    | MuSiQue
    | TwoWikiMultiHopQA
    | Bamboogle,
    Field(discriminator="name"),
]


def kind_of(task: Task) -> Kind:
    """How a task is played, which decides the methods that can play it."""
    if isinstance(task, QA):
        return "search"
    return "calls" if isinstance(task, Maths) and task.chain == "calls" else "text"
