"""The table of all numbers that a run measures: key, label, kind, format and curve of each.

Invariant: metrics, evals, progress and the report iterate this table; a new number is one new row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["fraction", "count", "number", "seconds", "tokens"]
"""fraction: 0 to 1. count: not negative. number: anything. seconds, tokens: what the report's cost
table adds up."""
Source = Literal["step", "outcome", "score", "pick", "timing"]
"""step: a row of metrics.jsonl. outcome: whether tries pass. score: a part of each episode. pick:
one answer chosen among a problem's samples. timing: a row of timings.jsonl."""
LARGEST_COUNT = 1e9


@dataclass(frozen=True, slots=True)
class Measure:
    """One number. Outcomes, scores and picks stand in evaluations; outcomes and scores also, as
    means over a step's episodes, in metrics.jsonl."""

    key: str  # in the rows of a run
    label: str  # in tables, and of a line in a curve
    kind: Kind = "number"
    source: Source = "step"
    format: str = ""  # on the progress line; empty if the line does not show it
    curve: str = ""  # title of its chart, shared by all that have the same; empty for no chart
    short: str = ""  # on the progress line, where not the label

    @property
    def title(self) -> str:
        """The label with a capital, for the head of a table."""
        return self.label[0].upper() + self.label[1:]

    def accepts(self, value: float) -> bool:
        """Whether a score's value is in the range of its kind."""
        return 0 <= value <= (LARGEST_COUNT if self.kind == "count" else 1)


MEASURES: tuple[Measure, ...] = (
    Measure("reward", "reward", format=".3f", curve="Reward"),
    Measure("first", "1st try", "fraction", "outcome", ".3f", "Solved", "first"),
    Measure("second", "within 2 tries", "fraction", "outcome", ".3f", "Solved", "second"),
    # Of the failed first tries.
    Measure("fixed", "failures fixed", "fraction", "outcome", curve="Solved"),
    Measure("kept", "kept", "count", format=",.0f"),
    # Question answering.
    Measure("em", "exact match", "fraction", "score", curve="Answers"),
    Measure("f1", "F1", "fraction", "score", curve="Answers"),
    Measure("format", "good form", "fraction", "score", curve="Answers"),
    # The gold paragraphs whose title a search has shown, and `result_tokens` not cut away.
    Measure("recall", "gold paragraphs shown", "fraction", "score", curve="Gold paragraphs shown"),
    Measure("searches", "searches", "count", "score", curve="Searches an episode"),
    Measure(
        "response", "tokens with results", "count", "score", curve="Response with results, tokens"
    ),
    Measure("judged", "judged right", "fraction", "score", curve="Answers"),
    # Multiple choice: the right letter stands below another value.
    Measure(
        "lucky",
        "right letter, other value",
        "fraction",
        "score",
        curve="Right letters below another value",
    ),
    # Method stepwise.
    Measure("steps", "actions", "count", "score", ".2f"),
    Measure("calls", "calls", "count", "score", ".2f"),
    Measure("errors", "tool errors", "count", "score"),
    Measure("malformed", "unreadable actions", "count", "score"),
    Measure("answered", "answered", "fraction", "score"),
    Measure("majority", "majority of the samples", "fraction", "pick"),
    Measure("reranked", "best sample by reward model", "fraction", "pick"),
    # Training.
    Measure("approved", "approved", "fraction", format=".1%", curve="Steps approved by the judge"),
    Measure("unscored", "unscored", "count", format=".0f"),
    Measure("dead", "dead", "count", format=".0f"),
    Measure("dead_share", "groups without signal", "fraction", curve="Groups without signal"),
    Measure("length", "length", format=".0f", curve="Trained tokens an episode"),
    Measure("accuracy", "accuracy", "fraction", format=".3f", curve="Reward model, new samples"),
    Measure("auc", "AUC", "fraction", format=".3f", curve="Reward model, new samples"),
    Measure("loss", "loss", format=".4f", curve="Loss"),
    Measure("kl", "KL", format=".2g", curve="KL to the reference"),
    Measure("entropy", "entropy", format=".3f", curve="Entropy, nats a token"),
    Measure("clip", "clipped", "fraction", format=".1%", curve="Clipped tokens"),
    Measure("explained_variance", "explained", format=".2f"),
    Measure("grad_norm", "grad", format=".3g", curve="Gradient norm before clipping"),
    Measure("lr", "lr", format=".2g"),
    Measure("mismatch_kl", "mismatch", format=".1g", curve="Sampler against learner, KL"),
    Measure("sample_tps", "sampling tok/s", "number", "timing", ",.0f", "Tokens a second"),
    Measure("learn_tps", "learning tok/s", "number", "timing", ",.0f", "Tokens a second"),
    Measure("skipped", "skipped steps", "count", format=".0f"),
    Measure("sample_s", "sampling", "seconds", "timing", curve="Seconds a step"),
    Measure("learn_s", "learning", "seconds", "timing", curve="Seconds a step"),
    Measure("eval_s", "evaluating", "seconds", "timing"),
    Measure("sampled", "tokens sampled", "tokens"),
    Measure("trained_tokens", "tokens trained", "tokens"),
)
"""In the order of the progress line and of the report."""
OUTCOMES = tuple(m for m in MEASURES if m.source == "outcome")
SCORES = {m.key: m for m in MEASURES if m.source == "score"}
_BY_KEY = {m.key: m for m in MEASURES}


def measure(key: str) -> Measure:
    """The measure of this key; an unknown score is a fraction."""
    return _BY_KEY.get(key) or Measure(key, key, "fraction", "score")
