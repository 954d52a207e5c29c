"""Rows of question-answering sets: one form for all the schemas that they come in.

Invariant: a row is either read whole, stripped of surrounding space, or refused by the column that
is wrong.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated, Any, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from minirl.episode import Problem
from minirl.errors import UserError

_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Paragraph(BaseModel):
    """A paragraph as a data set gives it."""

    idx: int
    title: _Text
    paragraph_text: str
    is_supporting: bool = False


class Hop(BaseModel):
    """One step of a decomposed question."""

    question: _Text
    answer: _Text
    paragraph_support_idx: int


class Row(BaseModel):
    """All that is read of a row, whichever data set it is of; a column that it does not have is
    empty."""

    identity: str | int = Field("", validation_alias=AliasChoices("_id", "id"))
    question: _Text = Field(validation_alias=AliasChoices("question", "Question"))
    answer: list[_Text] = Field(
        min_length=1, validation_alias=AliasChoices("answer", "Answer", "golden_answers")
    )
    answer_aliases: list[_Text] = []
    answerable: bool = True
    context: list[tuple[_Text, list[str]]] = []
    supporting_facts: list[tuple[_Text, int]] = []
    gold_titles: list[_Text] = []
    paragraphs: list[Paragraph] = []
    question_decomposition: list[Hop] = []

    @model_validator(mode="before")
    @classmethod
    def _to_one_form(cls, row: dict[str, Any]) -> dict[str, Any]:
        """Undo what copies change: the hub's columns for rows, null for nothing, FlashRAG's
        `metadata` for what is beside the answer."""
        beside = row.get("metadata")
        inner = (
            {k: beside.get(k) for k in ("context", "supporting_facts")}
            if isinstance(beside, dict)
            else {}
        )
        row = {k: v for k, v in (inner | row).items() if v is not None}
        if isinstance(context := row.get("context"), dict):
            titles, bodies = context.get("title"), context.get("sentences", context.get("content"))
            if (
                not isinstance(titles, list)
                or not isinstance(bodies, list)
                or len(titles) != len(bodies)
            ):
                raise ValueError(
                    "context: got columns of different lengths, expected a list `title` and an"
                    " equally long list `sentences`"
                )
            row["context"] = list(zip(titles, bodies, strict=True))
        if isinstance(facts := row.get("supporting_facts"), dict):
            row |= {"gold_titles": facts.get("title"), "supporting_facts": []}
        if row.get("answerable") is False:
            row["question_decomposition"] = []  # it names no paragraph, and the row is left out
        return row | {
            name: [row[name]] for name in ("answer", "Answer") if isinstance(row.get(name), str)
        }

    @model_validator(mode="after")
    def _check_hops(self) -> Self:
        if strange := {hop.paragraph_support_idx for hop in self.question_decomposition} - {
            p.idx for p in self.paragraphs
        }:
            raise ValueError(
                f"question_decomposition: paragraph_support_idx {min(strange)} is the idx of no"
                " paragraph"
            )
        return self

    @classmethod
    def read(cls, row: dict[str, Any], where: str) -> Self:
        """The row; UserError names `where`, the column and the first thing wrong with it."""
        try:
            return cls.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            column = ".".join(map(str, first["loc"])) or "row"
            got = (
                ""
                if first["type"] in ("missing", "value_error")
                else f" (got {str(first['input'])[:60]!r})"
            )
            said = first["msg"].removeprefix("Value error, ")
            raise UserError(f"{where}: {column}: {said}{got}; mend or delete the row") from error

    @property
    def golds(self) -> list[str]:
        """Texts any of which is right."""
        return list(dict.fromkeys([*self.answer, *self.answer_aliases]))

    @property
    def passages(self) -> list[tuple[str, str]]:
        """(title, text) of every paragraph that the row has."""
        own = [
            (title, " ".join(sentence.strip() for sentence in sentences))
            for title, sentences in self.context
        ]
        return own + [
            (paragraph.title, paragraph.paragraph_text.strip()) for paragraph in self.paragraphs
        ]

    def problem(self, task: str) -> Problem:
        """The question with all that is known about its answer; see tasks/qa.py."""
        passages = self.passages
        titles = list(
            dict.fromkeys([*self.gold_titles, *(title for title, _ in self.supporting_facts)])
        )
        gold = [passage for title in titles for passage in passages if passage[0] == title]
        by_idx = {
            paragraph.idx: passage
            for paragraph, passage in zip(
                self.paragraphs, passages[len(self.context) :], strict=True
            )
        }
        hops = [(hop, by_idx[hop.paragraph_support_idx]) for hop in self.question_decomposition]
        gold += [passage for _, passage in hops] or [
            by_idx[paragraph.idx] for paragraph in self.paragraphs if paragraph.is_supporting
        ]
        answer = {
            "golds": self.golds,
            "titles": list(dict.fromkeys([*titles, *(title for title, _ in gold)])),
            "paragraphs": [list(passage) for passage in dict.fromkeys(gold)],
            "steps": [[hop.question, hop.answer, title] for hop, (title, _) in hops],
        }
        return Problem(
            f"{task}/{self.identity or digest(self.question).hex()}", self.question, answer
        )


def digest(question: str) -> bytes:
    """What two rows that ask the same share, whatever their case and spacing."""
    return blake2b(
        " ".join(question.casefold().split()).encode("utf-8", "surrogatepass"), digest_size=16
    ).digest()
