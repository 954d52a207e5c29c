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
from pathlib import Path
from random import Random

from minirl.episode import Problem, Verdict
from minirl.errors import UserError
from minirl.io.rows import SUFFIXES, read_dataset
from minirl.recipe.maths import Gsm8k, Mathqa, Maths, Svamp
from minirl.tasks.calls import has_right_calls
from minirl.tasks.maths_rows import Row, read_row
from minirl.tasks.task import Demonstration, Task
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
_WORDS = re.compile(r"\w+|[-+*/^=<>%]")


def open_task(node: Gsm8k | Svamp | Mathqa, seed: int) -> Task:
    """The task; its problems are a function of `node` alone, so that runs with different seeds
    share their held-out set.

    Rows are taken in the order of their questions' digests. Raises UserError for data that cannot
    be had or read, for too few rows, and where the sandbox (chain: program) or math-verify
    (symbolic) is not installed.
    """
    check = _check(node)
    left_out: Counter[str] = Counter()
    test_source, local = (
        node.test_source or node.source,
        Path(node.source).suffix.lower() in SUFFIXES,
    )
    divided = test_source == node.source and (local or node.split == node.test_split)
    rows = _rows(node, node.source, node.split, "train", left_out)
    if divided:
        first: dict[str, Row] = {}
        for row in rows:
            first.setdefault(_key(row), row)
        held_out = list(first.values())[: node.held_out]
    else:
        held_out = _rows(node, test_source, node.test_split, "test", left_out)[: node.held_out]
    taken = {_key(row) for row in held_out}
    free = [row for row in rows if _key(row) not in taken]
    left_out["ask what a held-out row asks"] = len(rows) - len(free) - divided * len(held_out)
    train = tuple(_shown(node, free, check, left_out))
    if not train or len(held_out) < (node.held_out if divided else 1):
        raise UserError(
            f"{node.source}: got {len(train)} training rows and {len(held_out)} held-out questions"
            f" ({left_out.total()} rows left out), expected at least 1 and"
            f" {node.held_out if divided else 1}; give more data, a task.test_source or a smaller"
            " task.held_out"
        )
    notes = tuple(
        f"{node.name}: rows left out because they {reason}: {count}"
        for reason, count in sorted(left_out.items())
        if count
    )
    tests = tuple(_problem(node, row) for row in held_out)
    answer = (
        (lambda p, text: check(p, f"{PHRASE} {' '.join(text.split())}"))
        if node.chain == "calls"
        else None
    )
    return Task(
        node.name,
        train,
        tests,
        check,
        demonstrate=partial(demonstrate, node=node),
        notes=notes,
        verify_answer=answer,
    )


def demonstrate(problem: Problem, rng: Random, *, node: Maths) -> Demonstration:
    """The gold chain. Raises UserError where the data has none of the kind that the recipe asks for
    (GSM8K itself has no programs)."""
    if problem.solution is None:
        kinds = {
            "program": "Python programs (`def solution():`)",
            "prose": "chains in prose",
            "calls": "GSM8K's marks (`<<48/2=24>>`)",
        }
        kind = kinds[node.chain]
        raise UserError(
            f"{problem.id}: {node.source} has no chain to show for task.chain {node.chain!r}; give"
            f" a task.source with {kind} in the column `answer_cot`, or train without"
            " demonstrations"
        )
    return Demonstration(problem.solution)


def _check(node: Gsm8k | Svamp | Mathqa) -> Check:
    """The verifier that fits: of a program's value or letter, of a letter, or of a stated
    number."""
    letters = isinstance(node, Mathqa) and not node.numeric
    if node.chain == "program":
        require()
        limits = Limits(time_s=node.limits.time_s, memory_mb=node.limits.memory_mb)
        if letters:
            return lambda p, text: program.verify_letter(
                p.answer["letter"], len(p.answer["options"]), text, node.credit, limits=limits
            )
        return lambda p, text: program.verify(
            p.answer["value"], text, node.credit, tolerance=node.tolerance, limits=limits
        )
    if letters:
        return lambda p, text: option.verify(
            p.answer["letter"], p.answer["options"], text, node.credit
        )
    symbolic = Symbolic() if node.symbolic else None
    return lambda p, text: numeric.verify(
        p.answer["value"], text, node.credit, tolerance=node.tolerance, symbolic=symbolic
    )


def _rows(
    node: Gsm8k | Svamp | Mathqa, source: str, split: str, part: str, left_out: Counter[str]
) -> list[Row]:
    """The rows of a source in the order of their questions' digests: a row more or less moves no
    other to the other side."""
    setting = "task.test_source=PATH" if part == "test" else "task.source=PATH"
    found = enumerate(read_dataset(source, (), split, setting=setting), 1)
    rows = [
        read_row(node, f"{node.name}/{part}/{number}", where, row) for number, (where, row) in found
    ]
    if node.most_calls is not None:
        short = [
            row
            for row in rows
            if row.chain is not None and row.chain.count("<<") <= node.most_calls
        ]
        left_out["call the calculator too often, or have no chain"] += len(rows) - len(short)
        rows = short
    usable = [row for row in rows if row.gold is not None]
    if len(usable) < len(rows):
        left_out["have no number as their right option"] += len(rows) - len(usable)
    return sorted(usable, key=lambda row: blake2b(_key(row).encode()).digest())


def _shown(
    node: Gsm8k | Svamp | Mathqa, rows: Sequence[Row], check: Check, left_out: Counter[str]
) -> Iterator[Problem]:
    """The first `node.train` problems whose chain is right; where no row has a chain, all of
    them."""
    count, have_chains = 0, any(row.chain is not None for row in rows)
    for row in rows:
        problem = _problem(node, row)
        if have_chains and row.chain is None:
            left_out["have no chain, unlike the others"] += 1
        elif row.contradicts or (
            problem.solution is not None and not check(problem, problem.solution).passed
        ):
            left_out["have a chain that ends in another answer"] += 1
        elif (
            node.chain == "calls"
            and problem.solution is not None
            and not has_right_calls(problem.solution)
        ):
            left_out["have no calls in their chain, or calls whose result is another"] += 1
        else:
            yield problem
            count += 1
            if count == node.train:
                return


def _problem(node: Gsm8k | Svamp | Mathqa, row: Row) -> Problem:
    if row.options and row.is_letter:
        listed = "\n".join(
            f"({letter}) {text}" for letter, text in zip(option.LETTERS, row.options, strict=True)
        )
        answer = {"letter": row.gold, "options": list(row.options)}
        ask = ASK_LETTER_PROGRAM if node.chain == "program" else ASK_LETTER
        return Problem(row.id, f"{row.question}\n{listed}\n\n{ask}", answer, row.chain)
    if node.chain == "calls":
        return Problem(
            row.id, row.question, {"value": row.gold}, row.chain
        )  # what method stepwise asks for stands in its system message
    ask = ASK_PROGRAM if node.chain == "program" else ASK_NUMBER
    return Problem(row.id, f"{row.question}\n\n{ask}", {"value": row.gold}, row.chain)


def _key(row: Row) -> str:
    return " ".join(_WORDS.findall(row.question.casefold()))
