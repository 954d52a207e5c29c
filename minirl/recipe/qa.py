"""The question-answering tasks of a recipe: HotpotQA, MuSiQue, 2WikiMultiHopQA and Bamboogle."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from minirl.recipe.base import Frozen, Probability
from minirl.recipe.retriever import Bm25Retriever, Retriever


class QA(Frozen):
    """What the four have in common. A source is a hub id, with `:config` where it needs one, or a
    local JSON, JSONL or Parquet file."""

    name: str
    """Which of the four."""
    source: str
    """Where training questions come from."""
    split: str = "train"
    """The split of a hub `source`."""
    test_source: str | None = None
    """Where held-out questions come from, where that is not `source`."""
    test_split: str = "validation"
    """The hub split that held-out questions come from; where that is the training split, or the
    same file, the one source is divided."""
    train: NonNegativeInt = 20_000
    """Most questions to train on; 0 for evaluation only."""
    held_out: PositiveInt = 200
    """How many questions are kept for evaluation; none of them is trained on, whatever its case and
    spacing."""
    reward: Literal["f1", "exact_match"] = "f1"
    """What an episode in good form is worth: its answer's F1, or 1 for an exact match. Bad form is
    worth 0."""
    floor: Probability = 0.1
    """What an episode in good form is worth where that is 0 (ReSearch: 0.1; with 0 a search must
    help to pay)."""
    tags: Literal["research", "search_r1"] = "research"
    """The tags that are checked: think, search, result and answer with a \\\\boxed{}; Search-R1 has
    information for result, and no box."""
    retriever: Retriever = Bm25Retriever(kind="bm25")
    """What searches are answered from."""


class HotpotQA(QA):
    """HotpotQA (arXiv 1809.09600): two paragraphs a question."""

    name: Literal["hotpotqa"]
    """Names this task."""
    source: str = "hotpotqa/hotpot_qa:distractor"
    """Where training questions come from."""


class MuSiQue(QA):
    """MuSiQue (arXiv 2108.00573): two to four paragraphs a question, with a gold decomposition;
    what ReSearch trains on."""

    name: Literal["musique"]
    """Names this task."""
    source: str = "dgslibisey/MuSiQue"
    """Where training questions come from."""


class TwoWikiMultiHopQA(QA):
    """2WikiMultiHopQA (arXiv 2011.01060): two or four paragraphs a question."""

    name: Literal["2wikimultihopqa"]
    """Names this task."""
    source: str = "framolfese/2WikiMultihopQA"
    """Where training questions come from."""


class Bamboogle(QA):
    """Bamboogle (arXiv 2210.03350): 125 questions without paragraphs, for evaluation."""

    name: Literal["bamboogle"]
    """Names this task."""
    source: str = "chiayewken/bamboogle"
    """Where the questions come from."""
    split: str = "test"
    """The one split there is."""
    test_split: str = "test"
    """The same."""
    train: NonNegativeInt = 0
    """None: the set is for evaluation."""
    held_out: PositiveInt = 125
    """All of them."""
