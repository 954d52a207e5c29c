"""The retriever of a recipe: which passages are searched, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from minirl.recipe.base import Frozen, NonNegative, Probability


class Bm25Retriever(Frozen):
    """BM25 in this process (Robertson and Zaragoza 2009, with Lucene's idf); needs no server and no
    GPU."""

    kind: Literal["bm25"]
    """Names this kind of retriever."""
    sources: Annotated[tuple[str, ...], Field(min_length=1)] = ("context",)
    """Where passages come from, one after another: hub ids, files (.jsonl, .json, .parquet, .txt,
    .md), folders of such files, or `context`: the paragraphs that come with the task's own
    problems, each once."""
    split: str = "train"
    """The split to take of a source on the hub."""
    title: str = "title"
    """Column of the title; rows may lack it."""
    text: str = "text"
    """Column of the text: a string or a list of sentences (Search-R1's Wikipedia: `contents`)."""
    id: str = "id"
    """Column of the identifier; rows may lack it, a passage's number in the corpus stands in."""
    words: PositiveInt = 100
    """Plain text is cut into passages of at most this many words (100 is DPR's, arXiv 2004.04906).
    """
    title_weight: PositiveInt = 3
    """How many times a title counts in its passage. 3 instead of 1 adds 2.1 points (standard error
    0.6) to the recall of gold titles among the first 5, over 401 questions of HotpotQA, MuSiQue and
    2WikiMultiHopQA."""
    k1: NonNegative = 1.5
    """How slowly repeated words saturate; 0 counts a word once."""
    b: Probability = 0.75
    """How far long passages are marked down; 0 not at all."""
    k: PositiveInt = 5
    """Passages a query (ReSearch: 5, Search-R1: 3)."""
    query_words: PositiveInt = 256
    """A query is cut after this many words."""
    cache: bool = True
    """Keep the index in minirl's cache folder and map it into memory the next time; it is found
    again by the passages' content."""


class RemoteRetriever(Frozen):
    """A retriever behind HTTP: `POST {"queries": [...], "k": n}` is answered by a JSON list of
    passages for each query."""

    kind: Literal["remote"]
    """Names this kind of retriever."""
    url: str = Field(pattern=r"^https?://[^\s/?#]\S*$")
    """The address that is posted to, e.g. `http://127.0.0.1:8000/search`."""
    k: PositiveInt = 5
    """Passages a query (ReSearch: 5, Search-R1: 3)."""
    timeout_s: PositiveFloat = 30.0
    """Longest wait for a whole answer."""
    retries: NonNegativeInt = 3
    """How often to ask again when no answer comes or the server is at fault; the pause is 1 s, then
    twice as long each time."""


Retriever = Annotated[Bm25Retriever | RemoteRetriever, Field(discriminator="kind")]
