"""Rows of question-answering sets: one form for all the schemas that they come in.

Invariant: a row is either read whole, stripped of surrounding space, or refused, naming the column
that is wrong.
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
    """The columns that are read, of whichever data set; one that a row does not have is empty."""

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
        """Undo the changes of copies: the hub's columns for rows, null for nothing, FlashRAG's
        `metadata` for the columns beside the answer."""
        metadata = row.get("metadata")
        if isinstance(metadata, dict):
            row = {k: metadata.get(k) for k in ("context", "supporting_facts")} | row
        row = {k: v for k, v in row.items() if v is not None}
        if isinstance(context := row.get("context"), dict):
            titles, bodies = context.get("title"), context.get("sentences", context.get("content"))
            if not (isinstance(titles, list) and isinstance(bodies, list)) or len(titles) != len(
                bodies
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
        asked = {hop.paragraph_support_idx for hop in self.question_decomposition}
        if strange := asked - {paragraph.idx for paragraph in self.paragraphs}:
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
            has_value = first["type"] not in ("missing", "value_error")
            got = f" (got {str(first['input'])[:60]!r})" if has_value else ""
            said = first["msg"].removeprefix("Value error, ")
            raise UserError(f"{where}: {column}: {said}{got}; mend or delete the row") from error

    @property
    def golds(self) -> list[str]:
        """Texts any of which is right."""
        return list(dict.fromkeys([*self.answer, *self.answer_aliases]))

    @property
    def passages(self) -> list[tuple[str, str]]:
        """(title, text) of every paragraph that the row has."""
        own = [(title, " ".join(map(str.strip, sentences))) for title, sentences in self.context]
        return own + [(p.title, p.paragraph_text.strip()) for p in self.paragraphs]

    def problem(self, task: str) -> Problem:
        """The question with all that is known about its answer; see tasks/qa.py."""
        passages = self.passages
        facts = [title for title, _ in self.supporting_facts]
        titles = list(dict.fromkeys([*self.gold_titles, *facts]))
        gold = [passage for title in titles for passage in passages if passage[0] == title]
        indices = [paragraph.idx for paragraph in self.paragraphs]
        by_idx = dict(zip(indices, passages[len(self.context) :], strict=True))
        hops = [(hop, by_idx[hop.paragraph_support_idx]) for hop in self.question_decomposition]
        supporting = [by_idx[p.idx] for p in self.paragraphs if p.is_supporting]
        gold += [passage for _, passage in hops] or supporting
        answer = {
            "golds": self.golds,
            "titles": list(dict.fromkeys([*titles, *(title for title, _ in gold)])),
            "paragraphs": [list(passage) for passage in dict.fromkeys(gold)],
            "steps": [[hop.question, hop.answer, title] for hop, (title, _) in hops],
        }
        identity = self.identity or digest(self.question).hex()
        return Problem(f"{task}/{identity}", self.question, answer)


def digest(question: str) -> bytes:
    """A digest that is equal for questions that differ in case and spacing alone."""
    normal = " ".join(question.casefold().split())
    return blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()
