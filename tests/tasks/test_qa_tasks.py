"""The question-answering tasks over real rows and every schema: counts, golds, splits, plans,
coverage, and the name of each fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

from minirl.episode import Episode, Problem
from minirl.errors import UserError
from minirl.recipe.qa import QA, Bamboogle, HotpotQA, MuSiQue, TwoWikiMultiHopQA
from minirl.tasks import qa, qa_rows
from minirl.tasks.qa import Plan, SearchTask, Step, coverage, coverage_note, open_task, plan
from minirl.verify.qa import SEARCH_R1, f1, normalise, write_answer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(
    not (DATA / "hotpotqa").is_dir(), reason="no question-answering rows in ../shared/data"
)
NODES = TypeAdapter(
    Annotated[HotpotQA | MuSiQue | TwoWikiMultiHopQA | Bamboogle, Field(discriminator="name")]
)
FILES = {  # name, file -> rows
    ("hotpotqa", "train_100.json"): 100,
    ("hotpotqa", "dev_distractor_100.jsonl"): 100,
    ("hotpotqa", "dev_qa_only_7405.json"): 7405,
    ("musique", "train_100.json"): 100,
    ("2wikimultihopqa", "dev_101.json"): 101,
    ("bamboogle", "bamboogle.json"): 125,
}

Row = dict[str, Any]


def file(name: str, of: str) -> str:
    return str(DATA / name / of)


def node(name: str, source: str, **fields: Any) -> QA:
    made: QA = NODES.validate_python({"name": name, "source": source} | fields)
    return made


def opened(name: str, source: str, **fields: Any) -> SearchTask:
    return open_task(node(name, source, **fields), 0)


def hotpot() -> SearchTask:
    return opened(
        "hotpotqa",
        file("hotpotqa", "train_100.json"),
        test_source=file("hotpotqa", "dev_distractor_100.jsonl"),
        held_out=100,
    )


def by_id(task: SearchTask, row: str) -> Problem:
    return next(
        problem for problem in [*task.train, *task.held_out] if problem.id == f"{task.name}/{row}"
    )


def reply(answer: str) -> str:
    return f"<think>hm</think>{write_answer(answer)}"


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize(("name", "of", "rows"), [(*key, rows) for key, rows in FILES.items()])
def test_every_local_file_loads_whole_and_its_golds_pass(name: str, of: str, rows: int) -> None:
    task = opened(name, file(name, of), train=0, held_out=rows)
    assert (len(task.train), len(task.held_out), len(task.notes)) == (0, rows, 1)
    assert len({problem.id for problem in task.held_out}) == rows
    for number, problem in enumerate(task.held_out):
        golds = problem.answer["golds"]
        for gold in golds:
            verdict = task.verify(problem, reply(gold))
            assert (verdict.score, verdict.passed, verdict.parts["em"], verdict.parts["f1"]) == (
                1.0,
                True,
                1.0,
                1.0,
            ), gold
        other = task.held_out[number - 1].answer["golds"][0]
        if not f1(other, golds):
            assert (
                task.verify(problem, reply(other)).score,
                task.verify(problem, reply(other)).passed,
            ) == (0.1, False)
        assert not task.verify(problem, reply(f"not {golds[0]} at all")).passed
        assert not task.verify(problem, golds[0]).passed


@needs_data
def test_aliases_are_golds_too() -> None:
    task = opened("musique", file("musique", "train_100.json"), held_out=20)
    problem = by_id(task, "2hop__150763_14904")
    assert problem.answer["golds"] == ["G. Stanley Hall", "Stanley Hall"]
    assert task.verify(problem, reply("Stanley Hall")).passed
    assert not task.verify(problem, reply("Hall")).passed
    assert (
        sum(len(problem.answer["golds"]) > 1 for problem in [*task.train, *task.held_out]) == 28
    )  # rows with an alias of other letters
    strict = opened(
        "musique",
        file("musique", "train_100.json"),
        held_out=20,
        reward="exact_match",
        floor=0.0,
        tags="search_r1",
    )
    assert strict.verify(problem, "<think></think><answer>Stanley Hall</answer>").score == 1.0
    assert strict.verify(problem, "<think></think><answer>Hall</answer>").score == 0.0
    assert (strict.tags, strict.stop) == (SEARCH_R1, ("</answer>",))


def questions(problems: Any) -> set[str]:
    return {" ".join(problem.prompt.casefold().split()) for problem in problems}


@pytest.mark.slow
@needs_data
def test_no_question_is_in_both_splits_and_the_held_out_ones_stay() -> None:
    source = file("hotpotqa", "dev_qa_only_7405.json")
    task = opened(
        "hotpotqa", source, test_source=file("hotpotqa", "dev_distractor_100.jsonl"), held_out=100
    )
    assert (len(task.train), len(task.held_out)) == (7305, 100)  # the 100 are among the 7,405
    assert not questions(task.train) & questions(task.held_out)
    assert task.notes[0] == "hotpotqa: rows left out because they ask what a held-out row asks: 100"
    one, few, seeded = (
        opened("hotpotqa", source, held_out=50, train=train) for train in (7000, 10, 10)
    )
    assert (len(one.train), len(few.train), len(one.held_out)) == (7000, 10, 50)
    assert not questions(one.train) & questions(one.held_out)
    assert one.held_out == few.held_out == seeded.held_out
    assert (one.train[:10], few.train) == (few.train, seeded.train)
    assert opened("hotpotqa", source, held_out=60, train=0).held_out[:50] == one.held_out


def test_the_same_question_in_other_clothes_is_the_same(tmp_path: Path) -> None:
    train = write(
        tmp_path / "train.jsonl",
        [row("Who  is\tit?"), row("who is it?"), row("Who is that?"), row("Who was that?")],
    )
    test = write(tmp_path / "test.jsonl", [row("WHO IS THAT?"), row("Who else?")])
    task = opened("hotpotqa", train, test_source=test, held_out=2)
    assert questions(task.train) == {"who is it?", "who was that?"}
    assert questions(task.held_out) == {"who is that?", "who else?"}
    assert task.notes[:2] == (
        "hotpotqa: rows left out because they ask what a held-out row asks: 1",
        "hotpotqa: rows left out because they ask what another row asks: 1",
    )


def test_the_note_tells_of_the_corpus_that_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data's own paragraphs only where they are searched; what takes their place is opened and
    measured at start."""
    monkeypatch.setenv("MINIRL_CACHE", str(tmp_path / "cache"))
    facts = {"context": PAIRS, "supporting_facts": [["T1", 0], ["T2", 0]]}
    path = write(tmp_path / "rows.jsonl", [row(f"Who is {n}?") | facts for n in range(3)])
    corpus = write(
        tmp_path / "corpus.jsonl",
        [{"title": "t2", "text": "Three."}, {"title": "T3", "text": "Four."}],
    )

    def note(**retriever: Any) -> str:
        (said,) = opened("hotpotqa", path, held_out=1, retriever=retriever).notes
        return said

    assert (
        note(kind="bm25") == "hotpotqa: 2 paragraphs to search; gold paragraphs among them: 100.0%"
    )
    assert not (tmp_path / "cache").exists(), "nothing is indexed before the first search"
    assert (
        note(kind="bm25", sources=[corpus])
        == "hotpotqa: 2 paragraphs to search; gold paragraphs among them: 50.0%"
    )
    assert (
        note(kind="bm25", sources=[corpus, "context"])
        == "hotpotqa: 4 paragraphs to search; gold paragraphs among them: 100.0%"
    )
    said = note(kind="remote", url="http://127.0.0.1:9/search")
    assert (
        said
        == "hotpotqa: searches are answered by http://127.0.0.1:9/search; gold paragraphs there:"
        " unknown (a server)"
    )
    with pytest.raises(UserError, match="no_such"):
        note(kind="bm25", sources=[str(tmp_path / "no_such.jsonl")])


def test_questions_with_one_id_are_told_apart(tmp_path: Path) -> None:
    """Evaluations are kept and compared by the problems' ids."""
    path = write(
        tmp_path / "rows.jsonl",
        [row(f"Who is {n}?") | {"_id": "seven" if n % 2 else str(n)} for n in range(6)],
    )
    task = opened("hotpotqa", path, held_out=4)
    ids = [problem.id for problem in (*task.train, *task.held_out)]
    assert len(set(ids)) == 6
    assert {i for i in ids if "seven" not in i} == {"hotpotqa/0", "hotpotqa/2", "hotpotqa/4"}
    assert all(
        problem.id.startswith("hotpotqa/seven-")
        for problem in (*task.train, *task.held_out)
        if problem.prompt[7] in "135"
    )
    again = opened("hotpotqa", path, held_out=4)
    assert (again.train, again.held_out) == (task.train, task.held_out)


@needs_data
def test_pooled_paragraphs_are_the_published_corpora() -> None:
    task = hotpot()
    train = opened("hotpotqa", file("hotpotqa", "train_100.json"), held_out=20, train=80)
    corpus = json.loads(Path(file("hotpotqa", "train_corpus.json")).read_text(encoding="utf-8"))
    assert {title: text.split() for title, text in train.passages} == {
        title: " ".join(body).split() for title, body in corpus.items()
    }
    assert (len(train.passages), len(task.passages)) == (
        994,
        1993,
    )  # one paragraph is in both files
    musique = opened("musique", file("musique", "train_100.json"), held_out=20)
    corpus = json.loads(Path(file("musique", "train_corpus.json")).read_text(encoding="utf-8"))
    assert {title for title, _ in musique.passages} == {passage["title"] for passage in corpus}
    assert {text.strip() for _, text in musique.passages} == {
        passage["text"].strip() for passage in corpus
    }
    assert len(musique.passages) == 1890
    assert task.notes == (
        "hotpotqa: 1993 paragraphs to search; gold paragraphs among them: 100.0%",
    )


@needs_data
def test_gold_paragraphs_stand_in_the_problem() -> None:
    problem = by_id(hotpot(), "5a77ec115542992a6e59dff7")
    assert problem.prompt == "If Gallu is a demon Lilu is what?"
    assert problem.answer["titles"] == ["Alû", "Lilu (mythology)"]
    assert [title for title, _ in problem.answer["paragraphs"]] == problem.answer["titles"]
    assert problem.answer["paragraphs"][1][1].startswith(
        "A lilu or lilû is a masculine Akkadian word for a spirit"
    )
    for problem in [*hotpot().train, *hotpot().held_out]:
        assert [title for title, _ in problem.answer["paragraphs"]] == problem.answer["titles"]
        assert len(problem.answer["titles"]) == 2
    task = opened("musique", file("musique", "train_100.json"), held_out=20)
    hops = [len(problem.answer["steps"]) for problem in [*task.train, *task.held_out]]
    assert [hops.count(n) for n in (2, 3, 4)] == [68, 27, 5]
    episode = Episode(problem, ())
    assert Episode.from_json(json.loads(json.dumps(episode.to_json()))) == episode


@needs_data
def test_coverage_of_a_corpus() -> None:
    task = opened("2wikimultihopqa", file("2wikimultihopqa", "dev_101.json"), train=0, held_out=101)
    titles = [
        passage["title"]
        for passage in json.loads(
            Path(file("2wikimultihopqa", "corpus.json")).read_text(encoding="utf-8")
        )
    ]
    assert coverage(task.held_out, titles) == 1.0
    assert (
        coverage_note(task.held_out, titles, len(titles))
        == "6119 paragraphs to search; gold paragraphs among them: 100.0%"
    )
    wanted = sorted({title for problem in task.held_out for title in problem.answer["titles"]})
    assert coverage(task.held_out, []) == 0.0
    assert 0.0 < coverage(task.held_out, wanted[::2]) < 1.0  # type: ignore[operator]
    assert task.notes == (
        "2wikimultihopqa: the data has no paragraphs of its own; give the retriever a corpus",
    )


def test_coverage_by_hand() -> None:
    problems = [
        Problem(str(n), "?", {"titles": titles})
        for n, titles in enumerate([["A", "B"], ["B  &amp; c"], [], ["D", "A"]])
    ]
    assert coverage(problems, ["a", "B & C", "x"]) == 3 / 5
    assert (
        coverage_note(problems, ["a", "b & c"], 2)
        == "2 paragraphs to search; gold paragraphs among them: 60.0%"
    )
    assert coverage(problems[2:3], ["A"]) is None
    assert (
        coverage_note(problems[2:3], ["A"], 1)
        == "1 paragraphs to search; gold paragraphs among them: unknown"
    )


@needs_data
@pytest.mark.parametrize(
    ("row_id", "steps", "answer"),
    [
        (
            "5a716ec85542994082a3e82d",
            [("The Guest", "The Guest (film)"), ("You're Next", "You're Next")],
            "You're Next",
        ),
        (
            "5ae66d515542992ae0d16346",
            [("I'll Keep the Lovelight Burning",) * 2, ("Patti Page",) * 2],
            "1927",
        ),
        (
            "5a7c49dc55429935c91b514f",
            [(None, "Master of Science"), (None, "Hari Bahadur Basnet")],
            "Engineering",
        ),
        (
            "5a79caad5542994f819ef09f",
            [("2007 Los Angeles", "2007 Los Angeles Dodgers season"), ("Matt Kemp",) * 2],
            "Matthew Ryan Kemp",
        ),
    ],
)
def test_plans_of_real_hotpotqa_rows(
    row_id: str, steps: list[tuple[str | None, str]], answer: str
) -> None:
    problem = by_id(hotpot(), row_id)
    assert plan(problem) == Plan(
        tuple(Step(query or problem.prompt, title) for query, title in steps), answer
    )


@needs_data
def test_plans_of_real_musique_rows() -> None:
    task = opened("musique", file("musique", "train_100.json"), held_out=20)
    assert task.plan is plan
    assert plan(by_id(task, "3hop1__404363_705261_126049")) == Plan(
        (
            Step("Aschenbrödel composer", "Aschenbrödel", "Johann Strauss II"),
            Step("Johann Strauss II country of citizenship", "Vienna Walzer Orchestra", "Austria"),
            Step("Who was in charge of Austria ?", "Austria", "Karl Renner"),
        ),
        "Karl Renner",
    )
    two_references = plan(by_id(task, "3hop2__130734_798404_834843")).steps
    assert (
        two_references[2].query == "Midway (near Pleasant Plains), White County , Arkansas country"
    )
    for problem in [*task.train, *task.held_out]:
        made = plan(problem)
        assert made.answer == problem.answer["golds"][0] == made.steps[-1].found
        assert {step.title for step in made.steps} == set(problem.answer["titles"])
        assert not [
            step
            for step in made.steps
            if "#" in step.query.replace("#1 hit", "") or ">>" in step.query
        ]


@needs_data
def test_a_plan_asks_only_for_what_was_read() -> None:
    task = hotpot()
    whole = 0
    for problem in [*task.train, *task.held_out]:
        texts = dict(problem.answer["paragraphs"])
        made = plan(problem)
        assert sorted(step.title for step in made.steps) == sorted(problem.answer["titles"])
        known = set(normalise(problem.prompt.replace("'s", "")).split())
        for step in made.steps:
            if step.query != " ".join(problem.prompt.split()):
                assert (
                    set(normalise(step.query.replace("'s", "").replace("’s", "")).split()) <= known
                ), step
                whole += 1
            known |= set(normalise(texts[step.title].replace("'s", "").replace("’s", "")).split())
    assert whole == 344  # of 400 steps; the others ask the question itself


def test_a_plan_by_hand() -> None:
    texts = [
        ["Bond (film)", "A film by Ann Lee &amp; co."],
        ["Ann Lee (director)", "Her town is Ulm."],
        ["Ulm Old Town", "x"],
        ["Zzz Yyy", "x"],
    ]
    answer = {
        "golds": ["Ulm", "ulm"],
        "titles": [title for title, _ in texts][::-1],
        "paragraphs": texts,
        "steps": [],
    }
    made = plan(Problem("q/1", "Where is  Bond's maker from, the old?", answer))
    assert made == Plan(
        (
            Step("Bond", "Bond (film)"),
            Step("Ann Lee", "Ann Lee (director)"),
            Step("Ulm Old Town", "Ulm Old Town"),
            Step("Where is Bond's maker from, the old?", "Zzz Yyy"),
        ),
        "Ulm",
    )
    hops = [["A >> b", "X", "T1"], ["#1 of #2 or #0", "Y", "T2"], ["#2#1", "Z", "T1"]]
    made = plan(Problem("q/2", "?", answer | {"steps": hops}))
    assert [step.query for step in made.steps] == ["A b", "X of #2 or #0", "YX"]
    with pytest.raises(UserError, match="q/3: no supporting paragraphs are known"):
        plan(Problem("q/3", "?", answer | {"titles": []}))


def row(question: str = "Who?", **fields: Any) -> Row:
    return {"question": question, "answer": "Ada"} | fields


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


PAIRS = [["T1", ["One.", " Two."]], ["T2", ["Three."]]]
COLUMNS = {"title": ["T1", "T2"], "sentences": [["One.", " Two."], ["Three."]]}
PARAGRAPHS = [
    {"idx": n, "title": f"T{n}", "paragraph_text": f"Text {n}.", "is_supporting": n > 0}
    for n in range(3)
]
HOPS = [{"id": 1, "question": "A >> b", "answer": "B", "paragraph_support_idx": 2}]
HOPS += [{"id": 2, "question": "#1 >> c", "answer": "Ada", "paragraph_support_idx": 1}]


@pytest.mark.parametrize(
    ("data", "titles", "texts"),
    [
        (
            row(context=PAIRS, supporting_facts=[["T2", 0], ["T1", 1], ["T1", 0]]),
            ["T2", "T1"],
            ["Three.", "One. Two."],
        ),
        (
            row(context=COLUMNS, supporting_facts={"title": ["T1", "T1"], "sent_id": [0, 1]}),
            ["T1"],
            ["One. Two."],
        ),
        (
            row(context=COLUMNS, supporting_facts={"title": ["T1", "Away"], "sent_id": [0, 1]}),
            ["T1", "Away"],
            ["One. Two."],
        ),
        (
            row(paragraphs=PARAGRAPHS, question_decomposition=HOPS),
            ["T2", "T1"],
            ["Text 2.", "Text 1."],
        ),
        (
            row(paragraphs=PARAGRAPHS[::-1], question_decomposition=HOPS),
            ["T2", "T1"],
            ["Text 2.", "Text 1."],
        ),
        (row(paragraphs=PARAGRAPHS), ["T1", "T2"], ["Text 1.", "Text 2."]),
        ({"question": "Who?", "answer": ["Ada"], "gold_titles": ["T2", "T1"]}, ["T2", "T1"], []),
        ({"Question": "Who?", "Answer": "Ada"}, [], []),
        ({"Question": "Who?", "answer": [" Ada\n"], "id": "b_1", "source": "bamboogle"}, [], []),
        (
            {
                "id": "dev_0",
                "question": "Who?",
                "golden_answers": ["Ada"],
                "metadata": {"type": "bridge"},
            },
            [],
            [],
        ),
        (
            {
                "question": "Who?",
                "golden_answers": ["Ada"],
                "metadata": {
                    "context": {"title": ["T1"], "content": [["One.", "Two."]]},
                    "supporting_facts": {"title": ["T1"], "sent_id": [0]},
                },
            },
            ["T1"],
            ["One. Two."],
        ),
        (row(answer_aliases=None, context=None, metadata=None, supporting_facts=None), [], []),
    ],
)
def test_every_schema(tmp_path: Path, data: Row, titles: list[str], texts: list[str]) -> None:
    (problem,) = opened(
        "hotpotqa", write(tmp_path / "d.jsonl", [data]), train=0, held_out=1
    ).held_out
    assert problem.answer["golds"] == ["Ada"]
    assert problem.answer["titles"] == titles
    assert problem.answer["paragraphs"] == [
        [title, text] for title, text in zip(titles, texts, strict=False)
    ]
    assert problem.prompt == "Who?"


def test_parquet_is_read_like_the_hub(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        row(
            f"Who {n}?",
            id=f"r{n}",
            context=COLUMNS,
            supporting_facts={"title": ["T2"], "sent_id": [0]},
        )
        for n in range(3)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    task = opened("2wikimultihopqa", str(tmp_path / "d.parquet"), held_out=1)
    assert (len(task.train), len(task.held_out)) == (2, 1)
    assert task.passages == (("T1", "One. Two."), ("T2", "Three."))
    assert task.train[0].answer["paragraphs"] == [["T2", "Three."]]
    assert {problem.id for problem in (*task.train, *task.held_out)} == {
        f"2wikimultihopqa/r{n}" for n in range(3)
    }


def test_rows_that_cannot_be_scored_are_left_out_and_counted(tmp_path: Path) -> None:
    hops = [HOPS[0] | {"paragraph_support_idx": None}]
    rows = [
        row("One?"),
        row("Two?", answerable=False, paragraphs=PARAGRAPHS, question_decomposition=hops),
        row("Three?", answer="a } b"),
        row("Four?", answer="</answer>"),
        row("Five?", answerable=True),
        row("The?", answer="The The"),
    ]
    task = opened("musique", write(tmp_path / "d.jsonl", rows), held_out=1)
    assert questions([*task.train, *task.held_out]) == {"one?", "five?", "the?"}
    assert task.notes[:2] == (
        "musique: rows left out because they cannot be answered: 1",
        "musique: rows left out because they have an answer that the verifier cannot read: 2",
    )


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"answer": "Ada"}, "line 2: question: Field required; mend"),
        (row(""), "line 2: question: String should have at least 1 character (got '')"),
        (row(" \n"), "line 2: question: "),
        (row(7), "line 2: question: Input should be a valid string (got '7')"),  # type: ignore[arg-type]
        ({"question": "Who?"}, "line 2: answer: Field required"),
        (row(answer=None), "line 2: answer: Field required"),
        (row(answer=[]), "line 2: answer: List should have at least 1 item"),
        (row(answer=["Ada", ""]), "line 2: answer.1: String should have at least 1 character"),
        (row(answer="  "), "line 2: answer.0: "),
        (row(answer=1976), "line 2: answer: Input should be a valid list (got '1976')"),
        (row(answer={"text": "Ada"}), "line 2: answer: Input should be a valid list"),
        (row(answer_aliases="Ada"), "line 2: answer_aliases: Input should be a valid list"),
        (row(answer_aliases=[3]), "line 2: answer_aliases.0: Input should be a valid string"),
        (row(context="text"), "line 2: context: Input should be a valid list"),
        (row(context=[["T1"]]), "line 2: context.0.1: Field required"),
        (
            row(context=[["T1", "One."]]),
            "line 2: context.0.1: Input should be a valid list (got 'One.')",
        ),
        (row(context=[["", ["One."]]]), "line 2: context.0.0: "),
        (
            row(context=COLUMNS | {"title": ["T1"]}),
            "line 2: row: context: got columns of different lengths",
        ),
        (row(context={"title": ["T1"]}), "line 2: row: context: got columns of different lengths"),
        (
            row(context={"title": [3], "sentences": [["x"]]}),
            "line 2: context.0.0: Input should be a valid string",
        ),
        (row(supporting_facts=["T1"]), "line 2: supporting_facts.0: Input should be a valid tuple"),
        (
            row(supporting_facts={"sent_id": [0]}),
            "line 2: gold_titles: Input should be a valid list",
        ),
        (row(gold_titles="T1"), "line 2: gold_titles: Input should be a valid list"),
        (
            row(paragraphs=[{"title": "T", "paragraph_text": "x"}]),
            "line 2: paragraphs.0.idx: Field required",
        ),
        (
            row(paragraphs=PARAGRAPHS[:2], question_decomposition=HOPS),
            "line 2: row: question_decomposition: paragraph_support_idx 2 is the idx",
        ),
        (
            row(question_decomposition=HOPS),
            (
                "line 2: row: question_decomposition: paragraph_support_idx 1 is the idx of no"
                " paragraph"
            ),
        ),
        (
            row(paragraphs=PARAGRAPHS, question_decomposition=[HOPS[0] | {"answer": None}]),
            "line 2: question_decomposition.0.answer: ",
        ),
        ([1], "line 2: got a list, expected an object"),
    ],
)
def test_a_malformed_row_is_named_by_line_and_column(tmp_path: Path, bad: Any, said: str) -> None:
    source = write(tmp_path / "d.jsonl", [row("Good?"), bad])
    with pytest.raises(UserError) as caught:
        opened("hotpotqa", source, held_out=1)
    assert f"{source}, {said}" in str(caught.value)
    assert "\n" not in str(caught.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda v: st.lists(v, max_size=3),
    max_leaves=6,
)
columns = st.sampled_from(
    [
        "question",
        "Question",
        "answer",
        "answer_aliases",
        "answerable",
        "_id",
        "id",
        *qa_rows.Row.model_fields,
        "metadata",
    ]
)
inner = st.dictionaries(
    st.sampled_from(["title", "sentences", "content", "idx", "context", "supporting_facts"]),
    values,
    max_size=4,
)


@given(st.dictionaries(columns, values | inner | st.lists(inner, max_size=2), max_size=8))
def test_any_row_is_read_or_refused(data: Row) -> None:
    try:
        found = qa_rows.Row.read(row() | data, "here").problem("t")
    except UserError as error:
        said = str(error)
    else:
        said = "here: "
        assert json.loads(json.dumps(found.answer)) == found.answer
    assert said.startswith("here: ")


def test_data_that_cannot_be_had_names_its_setting(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", [row()])
    with pytest.raises(UserError, match=r"nowhere.json: no such file.*--set task.source=PATH"):
        opened("musique", "nowhere.json", test_source=source, held_out=1)
    with pytest.raises(UserError, match=r"nowhere.json: no such file.*--set task.test_source=PATH"):
        opened("musique", source, test_source="nowhere.json", held_out=1)


def test_too_few_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", [row("One?"), row("Two?")])
    for held_out in (2, 3):
        with pytest.raises(
            UserError,
            match=(
                f"got 2 held-out and 0 training questions .0 rows left out., expected {held_out}"
                " and some"
            ),
        ):
            opened("hotpotqa", source, held_out=held_out)
    assert len(opened("hotpotqa", source, held_out=2, train=0).held_out) == 2
    train, test = (
        write(tmp_path / "e.jsonl", [row("two?")]),
        write(tmp_path / "f.jsonl", [row("Two?")]),
    )
    with pytest.raises(
        UserError,
        match=r"got 1 held-out and 0 training questions \(1 rows left out\), expected 1 and some",
    ):
        opened("hotpotqa", train, test_source=test, held_out=1)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (
            "hotpotqa",
            [
                ("hotpotqa/hotpot_qa:distractor", "validation"),
                ("hotpotqa/hotpot_qa:distractor", "train"),
            ],
        ),
        ("musique", [("dgslibisey/MuSiQue", "validation"), ("dgslibisey/MuSiQue", "train")]),
        (
            "2wikimultihopqa",
            [("framolfese/2WikiMultihopQA", "validation"), ("framolfese/2WikiMultihopQA", "train")],
        ),
        ("bamboogle", [("chiayewken/bamboogle", "test")]),
    ],
)
def test_hub_names_and_splits(
    monkeypatch: pytest.MonkeyPatch, name: str, read: list[tuple[str, str]]
) -> None:
    asked: list[tuple[str, str]] = []

    def rows(source: str, columns: Any, split: str, setting: str) -> Iterator[tuple[str, Row]]:
        asked.append((source, split))
        yield from ((f"{source} ({split}), row {n}", row(f"{split} {n}?")) for n in range(130))

    monkeypatch.setattr(qa, "read_dataset", rows)
    task = open_task(NODES.validate_python({"name": name, "held_out": 125}), 0)
    assert asked == read
    assert len(task.held_out) == 125
    assert len(task.train) == (0 if name == "bamboogle" else 130)
    asked.clear()
    crossed = open_task(
        NODES.validate_python(
            {
                "name": "musique",
                "test_source": "chiayewken/bamboogle",
                "test_split": "test",
                "held_out": 9,
            }
        ),
        0,
    )
    assert asked == [("chiayewken/bamboogle", "test"), ("dgslibisey/MuSiQue", "train")]
    assert (len(crossed.train), len(crossed.held_out)) == (130, 9)
    asked.clear()
    assert (
        open_task(NODES.validate_python({"name": "musique", "train": 0, "held_out": 9}), 0).train
        == ()
    )
    assert asked == [("dgslibisey/MuSiQue", "validation")]


def test_the_nodes_of_a_recipe() -> None:
    made = NODES.validate_python({"name": "musique"})
    assert isinstance(made, MuSiQue)
    assert (made.reward, made.floor, made.tags, made.train, made.held_out) == (
        "f1",
        0.1,
        "research",
        20_000,
        200,
    )
    refused: list[Callable[[], Any]] = [
        lambda: NODES.validate_python({"name": "musiqe"}),
        lambda: NODES.validate_python({"name": "musique", "flor": 0.1}),
        lambda: NODES.validate_python({"name": "musique", "floor": 1.5}),
        lambda: NODES.validate_python({"name": "musique", "reward": "recall"}),
        lambda: NODES.validate_python({"name": "musique", "held_out": 0}),
        lambda: NODES.validate_python({"name": "musique", "train": -1}),
        lambda: setattr(made, "floor", 0.0),
    ]
    for make in refused:
        with pytest.raises(ValidationError):
            make()
    with pytest.raises(
        ValidationError, match="unknown key 'flor'; the nearest known key is 'floor'"
    ):
        refused[1]()
