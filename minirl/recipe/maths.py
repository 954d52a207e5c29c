"""The maths tasks of ReFT (arXiv 2401.08967): word problems answered by a chain of reasoning in
prose (N-CoT) or by a program (P-CoT)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from minirl.recipe.base import Frozen, NonNegative, Probability


class MathsCredit(Frozen):
    """Score of a wrong answer by error kind; a right one scores 1 (ReFT: 0.1 for a number that is
    wrong, in its code for a letter too)."""

    wrong_answer: Probability = 0.1
    """An answer that can be read and is wrong."""
    no_answer: Probability = 0.0
    """No answer that can be read, or no program that runs to one."""


class ProgramLimits(Frozen):
    """What one program may use in the sandbox."""

    time_s: PositiveFloat = 1.0
    """Seconds of a CPU that it may use (ReFT: 10)."""
    memory_mb: PositiveInt = 64
    """MiB it may hold."""


class Maths(Frozen):
    """What the three have in common. A source is a hub id, with `:config` where it needs one, or a
    local JSON, JSONL or Parquet file."""

    source: str
    """Where training questions come from."""
    split: str = "train"
    """The split of a hub `source`."""
    test_source: str | None = None
    """Where held-out questions come from, where that is not `source`."""
    test_split: str = "test"
    """The hub split that held-out questions come from; where that is the training split, or the
    same file, the one source is divided."""
    chain: Literal["prose", "program", "calls"] = "prose"
    """What is asked for, and shown in demonstrations: reasoning that ends in "The answer is N.", a
    Python function `solution()`, or for method stepwise calls of a calculator (shown from GSM8K's
    marks)."""
    most_calls: PositiveInt | None = None
    """calls: leave out questions whose gold chain calls the calculator more often; None for all
    (GSM8K: up to 9)."""
    docstring: bool = True
    """chain program: whether programs are shown with the docstring that repeats the question, as in
    ReFT's data, or without."""
    train: PositiveInt
    """Most rows to train on."""
    held_out: PositiveInt
    """Most questions that are kept for evaluation, and exactly so many where one source is divided;
    none of them is trained on."""
    tolerance: NonNegative = 0.01
    """Largest difference from the gold number that is right (ReFT: 1e-2, absolute)."""
    symbolic: bool = False
    """Value answers that are no plain number, such as 4π or 2(3 + 4), with math-verify; else they
    count as no answer, and so does in either case a range or a sum in digits alone, which is not
    worked out. Prose chains only."""
    credit: MathsCredit = MathsCredit()
    """Partial credit by error kind."""
    limits: ProgramLimits = ProgramLimits()
    """What a program may use."""

    @model_validator(mode="after")
    def _check_chain(self) -> Self:
        if self.chain == "prose" and not self.docstring:
            raise ValueError(
                "docstring: got false with chain 'prose', which has none; expected true"
            )
        if self.chain == "program" and self.symbolic:
            raise ValueError(
                "symbolic: got true with chain 'program', which returns a number; expected false"
            )
        if self.most_calls is not None and self.chain != "calls":
            raise ValueError(
                f"most_calls: got {self.most_calls} with chain {self.chain!r}, expected it with"
                " chain 'calls' alone"
            )
        return self


class Gsm8k(Maths):
    """GSM8K (arXiv 2110.14168): columns `question, answer`, or `question, answer_cot,
    answer_value`, which may hold programs."""

    name: Literal["gsm8k"]
    """Names this task."""
    source: str = "openai/gsm8k:main"
    """Where training questions come from."""
    train: PositiveInt = 7473
    """Most rows to train on."""
    held_out: PositiveInt = 1319
    """Most questions that are kept for evaluation."""


class Svamp(Maths):
    """SVAMP (arXiv 2103.07191): columns `question, answer_value` and perhaps `answer_cot`, or
    `Body, Question, Answer` without chains."""

    name: Literal["svamp"]
    """Names this task."""
    source: str = "ChilleD/SVAMP"
    """Where training questions come from."""
    train: PositiveInt = 3076
    """Most rows to train on."""
    held_out: PositiveInt = 1000
    """Most questions that are kept for evaluation."""


class Mathqa(Maths):
    """MathQA (arXiv 1905.13319): columns `Problem, Rationale, options, correct`, or `question,
    answer_value` and perhaps `answer_cot`."""

    name: Literal["mathqa"]
    """Names this task."""
    source: str = "regisss/math_qa"
    """Where training questions come from."""
    train: PositiveInt = 29_837
    """Most rows to train on."""
    held_out: PositiveInt = 1605
    """Most questions that are kept for evaluation."""
    numeric: bool = False
    """Ask for the number instead of an option's letter; rows whose right option is no number are
    left out and counted."""

    @model_validator(mode="after")
    def _check_numeric(self) -> Self:
        if self.symbolic and not self.numeric:
            raise ValueError(
                "symbolic: got true, but the answer is a letter; set numeric to true or symbolic to"
                " false"
            )
        return self
