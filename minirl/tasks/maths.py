"""GSM8K, SVAMP and MathQA: word problems from the hub or from local files, with chains of reasoning
in prose or as programs (ReFT).

Invariant: no held-out question, whatever its case, spacing and punctuation, is among the training
ones, and every chain that is shown passes the verifier. Training rows that cannot keep this are
left out and counted in the task's notes. So are, on either side, rows that the recipe does not ask
for: under `numeric` those whose right option is no number, under `most_calls` those that call too
often.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from random import Random

from minirl.episode import Problem, Verdict
from minirl.errors import UserError
from minirl.io.rows import read_dataset
from minirl.recipe.maths import Gsm8k, Mathqa, Maths, Svamp
from minirl.tasks.calls import has_right_calls
from minirl.tasks.maths_rows import Row, read_row
from minirl.tasks.task import Demonstration, Task, divides_source, note_left_out
from minirl.verify import numeric, option, program
from minirl.verify.sandbox import Limits, require
from minirl.verify.statement import PHRASE
from minirl.verify.symbolic import Symbolic

Check = Callable[[Problem, str], Verdict]

ASK_NUMBER = f'Reason step by step, then end with "{PHRASE} N." where N is the number alone.'
ASK_LETTER = (
    f'Reason step by step, then end with "{PHRASE} (x)." where x is the letter of the right option.'
)
ASK_PROGRAM = (
    "Answer with a Python function `solution()` that takes nothing, works step by step and returns"
    " the answer as a number."
)
ASK_LETTER_PROGRAM = (
    "Answer with a Python function `solution()` that takes nothing, works step by step and returns"
    " the letter of the right option as text."
)
CHAINS = {
    "program": "Python programs (`def solution():`)",
    "prose": "chains in prose",
    "calls": "GSM8K's marks (`<<48/2=24>>`)",
}
_WORDS = re.compile(r"\w+|[-+*/^=<>%]")


def open_task(task: Gsm8k | Svamp | Mathqa, seed: int) -> Task:
    """The task; its problems are a function of `task` alone, so that runs with different seeds
    share their held-out set.

    Rows are taken in the order of their questions' digests. Raises UserError for data that cannot
    be had or read, for too few rows, and if the sandbox (chain: program) or math-verify (symbolic)
    is not installed.
    """
    check = _choose_check(task)
    left_out: Counter[str] = Counter()
    divided = divides_source(task)
    rows = _read_rows(task, task.source, task.split, "train", left_out)
    if divided:
        questions: dict[str, Row] = {}
        for row in rows:
            questions.setdefault(_normalise(row), row)
        held_out = list(questions.values())[: task.held_out]
    else:
        test_source = task.test_source or task.source
        held_out = _read_rows(task, test_source, task.test_split, "test", left_out)[: task.held_out]
    taken = {_normalise(row) for row in held_out}
    free = [row for row in rows if _normalise(row) not in taken]
    left_out["ask what a held-out row asks"] = len(rows) - len(free) - divided * len(held_out)
    train = tuple(_pick_shown(task, free, check, left_out))
    fewest = task.held_out if divided else 1
    if not train or len(held_out) < fewest:
        raise UserError(
            f"{task.source}: got {len(train)} training rows and {len(held_out)} held-out questions"
            f" ({left_out.total()} rows left out), expected at least 1 and {fewest}; give more"
            " data, a task.test_source or a smaller task.held_out"
        )
    return Task(
        task.name,
        train,
        tuple(_problem(task, row) for row in held_out),
        check,
        demonstrate=partial(demonstrate, task=task),
        notes=note_left_out(task.name, left_out),
        verify_answer=partial(_check_answer, check) if task.chain == "calls" else None,
    )


def demonstrate(problem: Problem, rng: Random, *, task: Maths) -> Demonstration:
    """The gold chain. Raises UserError if the data has none of the kind that the recipe asks for
    (GSM8K itself has no programs)."""
    if problem.solution is None:
        raise UserError(
            f"{problem.id}: {task.source} has no chain to show for task.chain {task.chain!r}; give"
            f" a task.source with {CHAINS[task.chain]} in the column `answer_cot`, or train without"
            " demonstrations"
        )
    return Demonstration(problem.solution)


def _choose_check(task: Gsm8k | Svamp | Mathqa) -> Check:
    """The verifier that fits: of a program's value or letter, of a letter, or of a stated
    number."""
    letters = isinstance(task, Mathqa) and not task.numeric
    credit, tolerance = task.credit, task.tolerance
    if task.chain == "program":
        require()
        limits = Limits(time_s=task.limits.time_s, memory_mb=task.limits.memory_mb)
        if letters:
            return lambda p, text: program.verify_letter(
                p.answer["letter"], len(p.answer["options"]), text, credit, limits=limits
            )
        return lambda p, text: program.verify(
            p.answer["value"], text, credit, tolerance=tolerance, limits=limits
        )
    if letters:
        return lambda p, text: option.verify(p.answer["letter"], p.answer["options"], text, credit)
    symbolic = Symbolic() if task.symbolic else None
    return lambda p, text: numeric.verify(
        p.answer["value"], text, credit, tolerance=tolerance, symbolic=symbolic
    )


def _check_answer(check: Check, problem: Problem, answer: str) -> Verdict:
    return check(problem, f"{PHRASE} {' '.join(answer.split())}")


def _read_rows(
    task: Gsm8k | Svamp | Mathqa, source: str, split: str, part: str, left_out: Counter[str]
) -> list[Row]:
    """The rows of a source in the order of their questions' digests: a row more or less moves no
    other to the other side."""
    setting = "task.test_source=PATH" if part == "test" else "task.source=PATH"
    rows = [
        read_row(task, f"{task.name}/{part}/{number}", where, row)
        for number, (where, row) in enumerate(read_dataset(source, (), split, setting=setting), 1)
    ]
    if task.most_calls is not None:
        short = [r for r in rows if r.chain is not None and r.chain.count("<<") <= task.most_calls]
        left_out["call the calculator too often, or have no chain"] += len(rows) - len(short)
        rows = short
    usable = [row for row in rows if row.gold is not None]
    left_out["have no number as their right option"] += len(rows) - len(usable)
    return sorted(usable, key=lambda row: blake2b(_normalise(row).encode()).digest())


def _pick_shown(
    task: Gsm8k | Svamp | Mathqa, rows: Sequence[Row], check: Check, left_out: Counter[str]
) -> Iterator[Problem]:
    """The first `task.train` problems whose chain is right; all of them if no row has a chain."""
    count, have_chains = 0, any(row.chain is not None for row in rows)
    for row in rows:
        problem = _problem(task, row)
        chain = problem.solution
        if have_chains and chain is None:
            left_out["have no chain, unlike the others"] += 1
        elif row.contradicts or (chain is not None and not check(problem, chain).passed):
            left_out["have a chain that ends in another answer"] += 1
        elif task.chain == "calls" and chain is not None and not has_right_calls(chain):
            left_out["have no calls in their chain, or calls whose result is another"] += 1
        else:
            yield problem
            count += 1
            if count == task.train:
                return


def _problem(task: Gsm8k | Svamp | Mathqa, row: Row) -> Problem:
    if row.is_letter:
        options = zip(option.LETTERS, row.options, strict=True)
        listed = "\n".join(f"({letter}) {text}" for letter, text in options)
        answer = {"letter": row.gold, "options": list(row.options)}
        ask = ASK_LETTER_PROGRAM if task.chain == "program" else ASK_LETTER
        return Problem(row.id, f"{row.question}\n{listed}\n\n{ask}", answer, row.chain)
    if task.chain == "calls":  # the system message of method stepwise says what to do
        return Problem(row.id, row.question, {"value": row.gold}, row.chain)
    ask = ASK_PROGRAM if task.chain == "program" else ASK_NUMBER
    return Problem(row.id, f"{row.question}\n\n{ask}", {"value": row.gold}, row.chain)


def _normalise(row: Row) -> str:
    return " ".join(_WORDS.findall(row.question.casefold()))
