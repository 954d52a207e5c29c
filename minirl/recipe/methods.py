"""The facts of each method: all that a recipe and the loop must know of it without running it.

Invariant: only this table and `minirl/methods/__init__.py`, which binds a function to each of its
names, tell methods apart by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import AfterValidator

from minirl.recipe.own import is_own, load_function
from minirl.recipe.sampling import Sampling

Use = Literal["collect", "train", "eval"]
Kind = Literal["text", "search", "calls"]
"""Of a task: one answer in text; a question to search for; calls of a calculator."""
Tokens = Callable[[Sampling], int]
Method = TypeVar("Method", bound=Callable[..., Any])


def attempt(sampling: Sampling) -> int:
    """The tokens of one attempt."""
    return sampling.attempt_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodFacts:
    """uses: where a recipe may name it. plays: the kinds of task that it can play.

    starts_from: what a train stage gives it: the task's problems, failed attempts (those of a
    collect stage, or made on line), or the states of trajectories.
    samples: whether the model writes at all; False for a method that shows gold answers (SFT).
    takes_nll: whether it goes with loss nll, and only with it.
    sampled_tokens, trained_tokens: most tokens of an episode that are sampled, and trained.
    actions: how a judge finds its actions: one a turn, or by tags within one turn; None where it
    has none to judge. makes_states: whether its kept episodes split into states.
    options: keys of a train stage that are passed to the function; no other method takes them.
    replays: whether it can show kept samples token by token. shows_gold: whether a step also
    trains on each problem's demonstration.
    """

    uses: tuple[Use, ...] = ("collect", "train", "eval")
    plays: tuple[Kind, ...] = ("text", "search", "calls")
    starts_from: Literal["problems", "failures", "states"] = "problems"
    samples: bool = True
    takes_nll: bool = False
    sampled_tokens: Tokens = attempt
    trained_tokens: Tokens = attempt
    actions: Literal["turns", "tags"] | None = None
    makes_states: bool = False
    options: tuple[str, ...] = ()
    replays: bool = False
    shows_gold: bool = False

    @property
    def needs_judge(self) -> bool:
        """Whether only a judge can score its episodes: one new action at a stored state."""
        return self.starts_from == "states" and self.samples


USUAL = MethodFacts()
"""The facts of one's own method that says none."""


def _actions(sampling: Sampling) -> int:
    return sampling.stepwise.steps * sampling.attempt_tokens


def _baseline() -> MethodFacts:
    return MethodFacts(uses=("eval",), plays=("search",))


def method(**facts: Any) -> Callable[[Method], Method]:
    """Decorator that gives one's own method its facts, where they are not the usual ones: see
    `MethodFacts`.

        @minirl.method(trained_tokens=lambda sampling: 2 * sampling.attempt_tokens)
        def draft_revise(talk, task): ...
    """
    found = MethodFacts(**facts)

    def decorate(function: Method) -> Method:
        function.facts = found  # type: ignore[attr-defined]
        return function

    return decorate


def facts_of(name: str) -> MethodFacts:
    """The facts of a method of the table, or of one's own, whose file is then run."""
    if name in METHODS:
        return METHODS[name]
    found = getattr(load_function(name, "method"), "facts", None)
    return found if isinstance(found, MethodFacts) else USUAL


METHODS: dict[str, MethodFacts] = {
    "single": MethodFacts(plays=("text",)),
    "reflect": MethodFacts(
        uses=("train",),
        plays=("text",),
        starts_from="failures",
        sampled_tokens=lambda sampling: sampling.reflection_tokens + sampling.attempt_tokens,
        trained_tokens=lambda sampling: sampling.reflection_tokens,
        options=("train_all",),
    ),
    "self_train": MethodFacts(uses=("train",), plays=("text",), takes_nll=True, shows_gold=True),
    "demonstrate": MethodFacts(
        uses=("train",),
        plays=("text", "search"),
        samples=False,
        takes_nll=True,
        options=("reflections",),
        replays=True,
    ),
    "no_rag": _baseline(),
    "naive_rag": _baseline(),
    "iter_retgen": _baseline(),
    "ircot": _baseline(),
    "search": MethodFacts(uses=("train", "eval"), plays=("search",), actions="tags"),
    "stepwise": MethodFacts(
        plays=("search", "calls"),
        sampled_tokens=_actions,
        trained_tokens=_actions,
        actions="turns",
        makes_states=True,
    ),
    "step": MethodFacts(
        uses=("train",), plays=("search", "calls"), starts_from="states", actions="turns"
    ),
    "demonstrate_stepwise": MethodFacts(
        uses=("train",), plays=("search", "calls"), samples=False, takes_nll=True
    ),
    "imitate": MethodFacts(
        uses=("train",),
        plays=("search", "calls"),
        starts_from="states",
        samples=False,
        takes_nll=True,
    ),
}
EVALUATED_BY: dict[str, str] = {"text": "single", "search": "search", "calls": "stepwise"}
"""The method of an evaluation that names none, by the kind of its task."""


def names(use: str, kind: Kind | None = None) -> list[str]:
    """The methods that a recipe may name there, for a kind of task if given."""
    return [
        name
        for name, facts in METHODS.items()
        if use in facts.uses and (kind is None or kind in facts.plays)
    ]


def method_for(use: Use) -> AfterValidator:
    """Refuses a method that is not known, or that has no place in such a part of a recipe."""

    def check(method: str) -> str:
        if method not in names(use) and not is_own(method):
            known = ", ".join(names(use))
            raise ValueError(f"got {method!r}, expected one of {known}, or my_file.py:my_method")
        return method

    return AfterValidator(check)
