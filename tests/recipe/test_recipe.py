"""Recipes: every mistake is refused with its path, and what is resolved is the whole experiment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from minirl import recipe
from minirl.errors import UserError
from minirl.recipe import Recipe, cpu_form, load, override, parse

ROOT = Path(__file__).resolve().parents[2]
TRAIN = {"kind": "train", "method": "single", "steps": 1}
SFT = {"kind": "train", "method": "demonstrate", "steps": 1, "learner": {"loss": "nll"}}
COLLECT = {"kind": "collect"}


def data(**changes: Any) -> dict[str, Any]:
    """The smallest recipe, with changes laid over it."""
    smallest = {"model": {"name": "m"}, "task": {"name": "countdown"}, "stages": [TRAIN]}
    return laid_over(smallest, changes)


def laid_over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: laid_over(base[key], value)
        for key, value in top.items()
        if isinstance(base.get(key), dict) and isinstance(value, dict)
    }
    return base | top | both


def refused(**changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        parse(data(**changes), "r.yaml")
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("r.yaml: ")
    return said.removeprefix("r.yaml: ")


def learner(**numbers: Any) -> recipe.Learner:
    stage = parse(data(stages=[{**TRAIN, "learner": numbers}]), "r.yaml").stages[0]
    assert isinstance(stage, recipe.Train)
    return stage.learner


def saved(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "path", "got", "nearest"),
    [
        ({"stagse": []}, "recipe", "stagse", "stages"),
        ({"model": {"nam": "x"}}, "model", "nam", "name"),
        ({"model": {"lora": {"rnk": 8}}}, "model.lora", "rnk", "rank"),
        ({"task": {"numberz": [3]}}, "task", "numberz", "numbers"),
        (
            {"task": {"credit": {"mised_target": 0.1}}},
            "task.credit",
            "mised_target",
            "missed_target",
        ),
        ({"sampling": {"temprature": 1}}, "sampling", "temprature", "temperature"),
        ({"stages": [{**TRAIN, "stepz": 3}]}, "stages[0]", "stepz", "steps"),
        ({"stages": [TRAIN, {**TRAIN, "learner": {"bta": 0}}]}, "stages[1].learner", "bta", "beta"),
        ({"stages": [{"kind": "collect", "problem": 3}]}, "stages[0]", "problem", "problems"),
        ({"eval": {"trys": 2}}, "eval", "trys", "tries"),
        ({"save": {"evry": 2}}, "save", "evry", "every"),
        ({"task": {"name": "function_calling", "max_tool": 3}}, "task", "max_tool", "max_tools"),
    ],
)
def test_unknown_keys_at_every_level(
    changes: dict[str, Any], path: str, got: str, nearest: str
) -> None:
    assert (
        refused(**changes) == f"{path}: unknown key {got!r}; the nearest known key is {nearest!r}"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "m"}, "model: expected a mapping, e.g. {key: value} (got 'm')"),
        ({"model": {"name": 3}}, "model.name: Input should be a valid string (got '3')"),
        (
            {"model": {"lora": {"rank": 0}}},
            "model.lora.rank: Input should be greater than 0 (got '0')",
        ),
        ({"model": {"lora": {"rank": 1.5}}}, "model.lora.rank: Input should be a valid integer"),
        (
            {"model": {"quantize": "nf5"}},
            "model.quantize: Input should be 'none', 'nf4' or 'int8' (got 'nf5')",
        ),
        (
            {"task": {"name": "countdwn"}},
            "task.name: got 'countdwn', expected one of 'countdown', 'function_calling'",
        ),
        ({"task": {"numbers": [3, "x"]}}, "task.numbers[1]: Input should be a valid integer"),
        ({"task": {"train": "many"}}, "task.train: Input should be a valid integer"),
        ({"stages": []}, "stages: Tuple should have at least 1 item"),
        ({"stages": 5}, "stages: expected a list, e.g. [value] (got '5')"),
        ({"stages": [5]}, "stages[0]: expected a mapping, e.g. {key: value}"),
        ({"stages": [{"method": "single", "steps": 1}]}, "stages[0].kind: Field required"),
        (
            {"stages": [{"kind": "trian"}]},
            "stages[0].kind: got 'trian', expected one of 'collect', 'filter', 'train'",
        ),
        ({"stages": [{"kind": "train", "method": "single"}]}, "stages[0].steps: Field required"),
        (
            {"stages": [{**TRAIN, "method": "reflekt"}]},
            "stages[0].method: got 'reflekt', expected one of single, reflect, self_train, ",
        ),
        (
            {"stages": [TRAIN, {**TRAIN, "steps": -1}]},
            "stages[1].steps: Input should be greater than or equal to 0 (got '-1')",
        ),
        (
            {"stages": [{**TRAIN, "examples": "kept"}]},
            "stages[0]: examples: got 'kept' with method 'single', expected demonstrations",
        ),
        (
            {"stages": [{**SFT, "examples": "kept"}]},
            (
                "recipe: stages[0].examples: got 'kept', expected a collect stage with keep"
                " 'passed' right before"
            ),
        ),
        (
            {"stages": [COLLECT, {**SFT, "examples": "both"}]},
            "recipe: stages[1].examples: got 'both', expected a collect stage with keep 'passed'",
        ),
        (
            {"stages": [{**COLLECT, "keep": "passed"}, SFT, {**SFT, "examples": "both"}]},
            "recipe: stages[2].examples: got 'both', expected a collect",
        ),
        (
            {"stages": [{**SFT, "examples": "both", "reflections": 0.5}]},
            "stages[0]: reflections: got 0.5 with examples 'both', expected 0",
        ),
        (
            {"stages": [{**TRAIN, "learner": {"sampled_share": 0.5}}]},
            "stages[0].learner: sampled_share: got 0.5, which loss 'grpo' does not",
        ),
        (
            {"stages": [{**SFT, "learner": {"loss": "nll", "sampled_share": 2}}]},
            "stages[0].learner.sampled_share: Input should be less than",
        ),
        (
            {"stages": [{**TRAIN, "method": "self_train"}]},
            "stages[0]: learner.loss: got 'grpo' with method 'self_train', expected nll",
        ),
        (
            {"stages": [{**SFT, "learner": {"loss": "nll", "sampled_share": 0.5}}]},
            "stages[0]: learner.sampled_share: got 0.5 with method 'demonstrate', expected",
        ),
        (
            {
                "stages": [
                    {**SFT, "method": "self_train", "learner": {"loss": "nll", "minibatches": 2}}
                ]
            },
            "stages[0]: learner.minibatches: got 2 with method 'self_train', expected 1",
        ),
        (
            {"stages": [COLLECT, {"kind": "reward_model", "batch": 10, "micro_batch": 4}]},
            "stages[1]: micro_batch: got 4 with batch 10, expected a divisor of it",
        ),
        (
            {"stages": [{**TRAIN, "batch": 2, "learner": {"minibatches": 3}}]},
            "stages[0]: learner.minibatches: got 3 with batch 2, expected at most one a group",
        ),
        (
            {"stages": [{**TRAIN, "steps": 3, "learner": {"loss": "ppo", "value_warmup": 3}}]},
            "stages[0]: learner.value_warmup: got 3 of 3 steps, expected fewer",
        ),
        (
            {"task": {"name": "svamp", "docstring": False}},
            "task: docstring: got false with chain 'prose', which has none",
        ),
        (
            {"stages": [{**TRAIN, "learner": {"lr": float("inf")}}]},
            "stages[0].learner.lr: Input should be a finite number",
        ),
        (
            {"stages": [{**TRAIN, "learner": {"lr": float("nan")}}]},
            "stages[0].learner.lr: Input should be a finite number",
        ),
        (
            {"stages": [{**TRAIN, "learner": {"betas": [0.9]}}]},
            "stages[0].learner.betas[1]: Field required",
        ),
        (
            {"stages": [{**TRAIN, "group": 1}]},
            "stages[0]: group: got 1, expected at least 2 for baseline 'mean'",
        ),
        (
            {"stages": [{**TRAIN, "method": "demonstrate"}]},
            "stages[0]: learner.loss: got 'grpo' with method 'demonstrate', expected nll",
        ),
        (
            {"stages": [{**TRAIN, "learner": {"loss": "nll"}}]},
            "stages[0]: learner.loss: got 'nll' with method 'single', expected nll",
        ),
        ({"eval": {"samples": 4}}, "eval: samples: got 4 at temperature 0"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"seed": 2**31}, "seed: Input should be less than"),
        (
            {"track": ["tensorbord"]},
            "track[0]: Input should be 'tensorboard', 'wandb' or 'trackio'",
        ),
    ],
)
def test_wrong_values_are_named_by_path(changes: dict[str, Any], said: str) -> None:
    assert refused(**changes).startswith(said)


def test_a_missing_part_is_named() -> None:
    with pytest.raises(UserError, match=r"^r.yaml: model: Field required$"):
        parse({"task": {"name": "countdown"}, "stages": [TRAIN]}, "r.yaml")


def test_a_reward_models_micro_batch_may_hold_more_than_its_batch() -> None:
    collect = {**COLLECT, "keep": "all"}
    for batch, micro_batch in ((10, 5), (10, 10), (10, 16)):
        assert parse(
            data(
                stages=[
                    collect,
                    {"kind": "reward_model", "batch": batch, "micro_batch": micro_batch},
                ]
            ),
            "r.yaml",
        )


def test_a_stage_that_is_left_out_may_keep_its_warm_up() -> None:
    learner = {"loss": "ppo", "value_warmup": 5}
    assert parse(
        data(
            stages=[
                {**TRAIN, "steps": 0, "learner": learner},
                {**TRAIN, "steps": 6, "learner": learner},
            ]
        ),
        "r.yaml",
    )


def test_presets_are_numbers_that_can_be_overridden() -> None:
    assert learner() == learner(loss="grpo")
    grpo, dapo, gspo, reinforce = (
        learner(loss=name) for name in ("grpo", "dapo", "gspo", "reinforce")
    )
    assert (
        grpo.baseline,
        grpo.scale,
        grpo.aggregate,
        grpo.clip_low,
        grpo.clip_high,
        grpo.beta,
    ) == (
        "mean",
        "std",
        "sequence",
        0.2,
        0.2,
        1e-3,
    )
    assert (dapo.aggregate, dapo.clip_low, dapo.clip_high, dapo.beta, dapo.drop_overlong) == (
        "token",
        0.2,
        0.28,
        0.0,
        True,
    )
    assert (gspo.ratio, gspo.clip_low, gspo.clip_high) == ("sequence", 3e-4, 4e-4)
    assert (reinforce.baseline, reinforce.clip_low, reinforce.clip_high, reinforce.beta) == (
        "none",
        None,
        None,
        0.0,
    )
    assert learner(loss="dr_grpo").scale == "none"
    assert learner(loss="rloo").baseline == "leave_one_out"
    assert learner(loss="dapo", clip_high=0.3, beta=0.01) == dapo.model_copy(
        update={"clip_high": 0.3, "beta": 0.01}
    )
    assert learner(loss="reinforce", clip_low=0.1).clip_low == 0.1
    assert set(recipe.PRESETS) == set(recipe.Learner.model_fields["loss"].annotation.__args__)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("model.lora.rank=32", ("model", "lora", "rank"), 32),
        ("stages.0.steps=5", ("stages", 0, "steps"), 5),
        ("stages.0.learner.lr=5e-6", ("stages", 0, "learner", "lr"), "5e-6"),
        ("task.numbers=[3]", ("task", "numbers"), [3]),
        ("eval={tries: 2}", ("eval", "tries"), 2),
        ("model.adapter=null", ("model", "adapter"), None),
        ("task.source=a=b.json", ("task", "source"), "a=b.json"),
        ("model.name=", ("model", "name"), None),
    ],
)
def test_override(text: str, path: tuple[str | int, ...], value: Any) -> None:
    before = data()
    node: Any = override(before, text)
    for key in path:
        node = node[key]
    assert node == value
    assert before == data(), "the recipe must not change in place"


def test_overrides_are_read_and_checked(tmp_path: Path) -> None:
    path = saved(tmp_path, yaml.safe_dump(data()))
    node = load(
        path,
        [
            "stages.0.steps=5",
            "stages.0.learner.lr=5e-6",
            "stages.0.steps=6",
            "model.lora={rank: 3}",
        ],
    )
    assert isinstance(node.stages[0], recipe.Train)
    assert (node.stages[0].steps, node.stages[0].learner.lr, node.model.lora.rank) == (6, 5e-6, 3)
    with pytest.raises(
        UserError, match=r"model.lora: unknown key 'rnk'; the nearest known key is 'rank'"
    ):
        load(path, ["model.lora.rnk=1"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model.lora.rank", "expected a.b=value"),
        ("=3", "expected a.b=value"),
        ("stages.1.steps=5", "got '1', expected the number of a list item, 0 to 0"),
        ("stages.x.steps=5", "got 'x', expected the number of a list item, 0 to 0"),
        ("model.name.first=5", "'first' lies under a plain value, 'm'"),
        ("model.lora={rank: 1", "the value is not valid YAML"),
        ("seed=!!python/name:os.system", "the value is not valid YAML"),
        ("model.lora={rank: 1, rank: 2}", "the key 'rank' is written twice"),
    ],
)
def test_an_override_that_cannot_be_laid_on(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        override(data(), text)
    assert str(caught.value).startswith(f"--set {text}: ")
    assert said in str(caught.value)


def test_a_stage_is_taken_out_once_all_overrides_are_laid(tmp_path: Path) -> None:
    path = saved(tmp_path, yaml.safe_dump(data(stages=[COLLECT, TRAIN, TRAIN])))
    stages = load(path, ["stages.0=null", "stages.1.steps=7", "stages.2=null"]).stages
    assert stages == parse(data(stages=[TRAIN | {"steps": 7}]), "r").stages
    with pytest.raises(UserError, match="stages: "):
        load(path, ["stages.0=null", "stages.1=null", "stages.2=null"])
    with pytest.raises(UserError, match=r"stages\[0\]"):  # in a file it is a slip
        load(saved(tmp_path, yaml.safe_dump(data(stages=[None, TRAIN]))))


def test_the_key_on_cpu_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, yaml.safe_dump(data(on_cpu={"seed": 7})))
    with pytest.raises(UserError, match="got the key on_cpu, expected a file of its own") as caught:
        load(path)
    assert str(caught.value).endswith(f"to {tmp_path / 'cpu' / 'r.yaml'}")


def test_the_form_for_a_cpu_is_beside_the_recipe(tmp_path: Path) -> None:
    path = saved(tmp_path, "")
    assert cpu_form(path) == path
    (tmp_path / "cpu").mkdir()
    small = saved(tmp_path / "cpu", "")
    assert cpu_form(path) == cpu_form(small) == small


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: !!python/object/apply:os.system ['echo run']", "not valid YAML"),
        ("model: !!python/object/new:pathlib.Path ['x']", "not valid YAML"),
        ("seed: 1\nmodel: {name: a}\nseed: 2", "the key 'seed' is written twice"),
        ("model: {name: a, name: b}", "the key 'name' is written twice"),
        ("model: {name: a", "not valid YAML"),
        ("[" * 1000, "not valid YAML"),
        ("", "got NoneType, expected a mapping with the keys model, task, stages"),
        ("- model", "got list, expected a mapping"),
        ("model: &m [*m]", "model: expected a mapping"),
    ],
)
def test_yaml_that_is_no_recipe(
    tmp_path: Path, text: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load(saved(tmp_path, text))
    assert said in str(caught.value)
    assert str(tmp_path / "r.yaml") in str(caught.value)
    assert capfd.readouterr().out == "", "nothing in a recipe is run"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"seed: 1 # caf\xe9")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(UserError, match=r"cannot read the recipe \(.*\); expected a YAML file"):
            load(path)


def test_merge_keys_may_repeat_what_they_merge(tmp_path: Path) -> None:
    text = yaml.safe_dump(data()) + "eval: &e {tries: 2, problems: 5}\nsave: {every: 3}\n"
    assert load(saved(tmp_path, text.replace("eval: &e", "eval: "))).eval.problems == 5
    merged = text.replace(
        "save: {every: 3}", "sampling: {<<: {rows: 2, attempt_tokens: 3}, rows: 4}"
    )
    assert load(saved(tmp_path, merged)).sampling.rows == 4


def test_frozen() -> None:
    node = parse(data(), "r.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        node.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        node.model.lora.rank = 3
    assert isinstance(node.stages, tuple)


RECIPES = sorted((ROOT / "recipes").glob("**/*.yaml"))


def test_every_recipe_has_both_forms() -> None:
    names = [[p.name for p in RECIPES if (p.parent.name == "cpu") == cpu] for cpu in (False, True)]
    assert names[0] == names[1] != []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_loads_and_says_its_plan(path: Path) -> None:
    node = load(path)
    plan = node.plan().splitlines()
    assert plan[0] == f"plan: {node.model.name} on {node.task.name}, seed {node.seed}"
    assert len(plan) == 2 + len(node.stages)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert "  minirl run recipes/" in "".join(lines[:3]), "a recipe says at its head what it is"
    assert sum(line.startswith("#") for line in lines) <= 6
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("loss", list(recipe.PRESETS))
def test_dump_and_load_round_trip(tmp_path: Path, loss: str) -> None:
    method = "demonstrate" if loss == "nll" else "single"
    stage = {**TRAIN, "method": method, "learner": {"loss": loss, "lr": 3.3e-7}}
    node = parse(
        data(stages=[{"kind": "collect"}, stage], seed=5, task={"source": "a: b #c.json"}), "r.yaml"
    )
    again = load(saved(tmp_path, node.dump()))
    assert again == node
    assert again.dump() == node.dump()
    assert all(key in node.dump() for key in Recipe.model_fields), "every default is written out"


def test_plan() -> None:
    collect = {"kind": "collect", "problems": 10, "samples": 4, "keep_each": 2}
    reflect, sampling = (
        {**TRAIN, "method": "reflect", "steps": 3},
        {"attempt_tokens": 100, "reflection_tokens": 50},
    )
    node = parse(
        data(stages=[collect, reflect], eval={"every": 2, "tries": 2}, sampling=sampling), "r.yaml"
    )
    assert (
        node.plan()
        == "plan: m on countdown, seed 0\n  0  collect  single: 10 problems x 4 attempts, keep"
        " failed (at most 2 of each), at most 0.004 M sampled tokens\n  1  train    reflect: 3"
        " steps of 16 groups x 8 episodes, loss grpo, lr 1e-05, at most 0.0576 M sampled"
        " tokens\n  evaluation before the first stage, after each train stage, every 2 steps:"
        " 200 held-out problems x 1, 2 tries, temperature 0"
    )
    alone = parse(data(stages=[reflect], sampling=sampling), "r.yaml").plan()
    assert "at most 0.0768 M sampled tokens" in alone, (
        "3 x 16 x 4 first tries of 100 tokens besides"
    )
    assert "sampled" not in parse(data(stages=[SFT]), "r.yaml").plan()


def _nodes() -> Iterator[type[recipe.Frozen]]:
    return (
        kind
        for kind in vars(recipe).values()
        if isinstance(kind, type) and issubclass(kind, recipe.Frozen)
    )


@pytest.mark.parametrize("node", list(_nodes()), ids=lambda node: node.__name__)
def test_every_number_is_documented_where_it_is_defined(node: type[recipe.Frozen]) -> None:
    assert node.__doc__
    assert [
        name for name, field in node.model_fields.items() if not (field.description or "").strip()
    ] == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["task.name=gsm8k"],
        ["task.name=gsm8k", "task.source=a.json"],
        ["task.source=b.json", "task.name=gsm8k"],
    ],
)
def test_another_task_by_its_name_alone(tmp_path: Path, overrides: list[str]) -> None:
    path = saved(tmp_path, yaml.safe_dump(data(task={"name": "countdown", "operators": "+-"})))
    with pytest.raises(
        UserError,
        match=(
            r"unknown key 'operators'; .*write --set 'task={name: gsm8k}' to leave out the other"
            r" keys of task c"
        ),
    ):
        load(path, overrides)
    assert load(path, ["task={name: gsm8k}"]).task.name == "gsm8k"
    assert load(path, ["task.name=countdown"]).task.name == "countdown"


def test_another_task_never_reads_the_files_of_the_first(tmp_path: Path) -> None:
    """Catches: SVAMP's rows trained on under the name of GSM8K, and nothing said."""
    path = saved(
        tmp_path,
        yaml.safe_dump(data(task={"name": "svamp", "source": "svamp.json", "held_out": 7})),
    )
    with pytest.raises(
        UserError,
        match=(
            r"--set task.name=gsm8k: task.source is still 'svamp.json'; write --set 'task={name:"
            r" gsm8k}'"
        ),
    ):
        load(path, ["task.name=gsm8k"])
    node = load(path, ["task.name=gsm8k", "task.source=gsm8k.json"]).task
    assert (node.name, node.source, node.held_out) == ("gsm8k", "gsm8k.json", 7)
    qa = data(task={"name": "hotpotqa"}, stages=[TRAIN | {"method": "search"}])
    assert (
        load(saved(tmp_path, yaml.safe_dump(qa)), ["task.name=bamboogle"]).task.name == "bamboogle"
    ), "each reads its own set"
    resolved = load(saved(tmp_path, yaml.safe_dump(qa))).dump()  # names the set
    with pytest.raises(UserError, match=r"task.source is still 'hotpotqa/hotpot_qa"):
        load(saved(tmp_path, resolved), ["task.name=bamboogle"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("task=countdown", "task: expected a mapping, e.g. {key: value} (got 'countdown')"),
        ("model.lora=8", "model.lora: expected a mapping, e.g. {key: value} (got '8')"),
        ("track=wandb", "track: expected a list, e.g. [value] (got 'wandb')"),
        ("task.numbers=3", "task.numbers: expected a list, e.g. [value] (got '3')"),
        (
            "sampling.top_p=0.9",
            "sampling: unknown key 'top_p'; expected one of temperature, attempt_tokens",
        ),
    ],
)
def test_types_in_the_words_of_yaml(tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        load(saved(tmp_path, yaml.safe_dump(data())), [change])


@pytest.mark.parametrize("loss", ["dapo", "reinforce", "ppo"])
def test_another_loss_by_its_name_alone_is_that_loss(loss: str) -> None:
    """Catches: a number of one loss written out in a recipe, which stays when another is asked
    for."""
    path = ROOT / "recipes/grpo_countdown.yaml"
    for stage, form in ((0, path), (1, cpu_form(path))):
        before, after = (
            load(form, change).stages[stage]
            for change in ([], [f"stages.{stage}.learner.loss={loss}"])
        )
        assert isinstance(before, recipe.Train)
        assert isinstance(after, recipe.Train)
        own = recipe.Learner.model_validate({"loss": loss})
        changed = {
            name
            for name in recipe.Learner.model_fields
            if getattr(before.learner, name) != getattr(after.learner, name)
        }
        assert after.learner.beta == own.beta != before.learner.beta
        assert all(getattr(after.learner, name) == getattr(own, name) for name in changed)
