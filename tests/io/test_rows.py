"""Rows of local files and of the hub: what is read, and what each fault is called."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minirl.errors import UserError
from minirl.io import hub
from minirl.io.rows import read_dataset

ROWS = [{"a": 1, "b": "ä\u2028x"}, {"a": [2], "b": None}, {"a": {"c": 3}, "b": ""}]
ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def fault(source: str, columns: tuple[str, ...] = ("a", "b")) -> str:
    with pytest.raises(UserError) as caught:
        list(read_dataset(source, columns))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_reads_json_and_jsonl_alike(tmp_path: Path, mark: bytes) -> None:
    as_list = write(
        tmp_path / "d.json", mark + json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
    )
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    as_lines = write(tmp_path / "d.JSONL", mark + "\r\n".join([lines[0], "", *lines[1:]]).encode())
    assert list(read_dataset(as_list, ["a", "b"])) == [
        (f"{as_list}, row {i}", row) for i, row in enumerate(ROWS, 1)
    ]
    assert list(read_dataset(as_lines, ["a"])) == [
        (f"{as_lines}, line {i}", row) for i, row in zip((1, 3, 4), ROWS, strict=True)
    ]
    assert list(read_dataset(write(tmp_path / "none.json", " [ ] "), ["a"])) == []


def test_reads_parquet_and_names_the_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.table({"a": [1, 2], "b": ["x", "y"]}), path)
    assert list(read_dataset(str(path), ["a", "b"])) == [
        (f"{path}, row 1", {"a": 1, "b": "x"}),
        (f"{path}, row 2", {"a": 2, "b": "y"}),
    ]
    assert "d.parquet, row 1: no column 'c' (got a, b)" in fault(str(path), ("a", "c"))
    assert "not readable as Parquet" in fault(write(tmp_path / "bad.parquet", "PAR1 no"))


GOOD = '{"a": 1, "b": 2}'


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("d.jsonl", f"{GOOD}\n\n{{'a': 1}}\n", "d.jsonl, line 3: not valid JSON"),
        (
            "d.jsonl",
            f"{GOOD}\n{GOOD} {GOOD}\n",
            "d.jsonl, line 2: not valid JSON (Extra data at column 18), expected one object a line",
        ),
        (
            "d.jsonl",
            f"{GOOD}\n[1]\n",
            "d.jsonl, line 2: got a list, expected an object with the columns a, b",
        ),
        (
            "d.jsonl",
            f'{GOOD}\n{{"a": 1}}\n',
            "d.jsonl, line 2: no column 'b' (got a), expected a, b",
        ),
        ("d.jsonl", f"{GOOD}\n".encode() + b'{"a": "\xff", "b": 1}', "d.jsonl, line 2: not UTF-8"),
        (
            "d.jsonl",
            f'{GOOD}\n{{"a": NaN, "b": 1}}',
            "d.jsonl, line 2: not valid JSON (NaN is not a JSON number)",
        ),
        ("d.jsonl", f"{GOOD}\n" + "[" * 100_000, "d.jsonl, line 2: not valid JSON"),
        ("d.jsonl", f'{{"a": {"9" * 5000}, "b": 1}}', "d.jsonl, line 1: not valid JSON"),
        (
            "d.json",
            f"[{GOOD},\n{GOOD},\n{{'a'}}]",
            "d.json, line 3: not valid JSON (Expecting property name",
        ),
        ("d.json", f"[{GOOD},\n 7]", "d.json, row 2: got a number, expected an object"),
        ("d.json", f"[{GOOD},\n {GOOD}\n {GOOD}]", "d.json, line 3: not valid JSON (Expecting ','"),
        ("d.json", f"[{GOOD},]", "d.json, line 1: not valid JSON"),
        ("d.json", f"[{GOOD}", "d.json, line 1: not valid JSON"),
        ("d.json", f"[{GOOD}] {GOOD}", "d.json, line 1: not valid JSON (Extra data"),
        ("d.json", f"{GOOD}\n{GOOD}", "expected a list of objects; name the file .jsonl"),
        ("d.json", "", "expected a list of objects"),
        (
            "d.csv",
            "a,b\n1,2\n",
            "got a file ending in '.csv', expected one of .json, .jsonl, .parquet",
        ),
    ],
)
def test_a_malformed_row_is_named_by_file_and_number(
    tmp_path: Path, name: str, text: str | bytes, said: str
) -> None:
    assert said in fault(write(tmp_path / name, text))


def test_good_rows_come_before_the_fault(tmp_path: Path) -> None:
    rows = read_dataset(write(tmp_path / "d.json", f"[{GOOD}, 3]"), ["a"])
    assert next(rows)[1] == {"a": 1, "b": 2}
    with pytest.raises(UserError, match="row 2"):
        next(rows)


@pytest.mark.parametrize(
    "source",
    ["missing.json", "owner/missing.jsonl", "./missing", "/nowhere/at/all", "no such thing", "one"],
)
def test_a_missing_file_is_one_line_with_a_way_out(source: str) -> None:
    said = fault(source)
    assert said.startswith(f"{source}: no such file")
    assert "--set task.source=PATH" in said


def test_a_folder_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "owner/name: is a folder" in fault("owner/name")


class _Handler(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_answers", {})
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.mark.parametrize(
    ("status", "answers"), [(200, True), (404, True), (401, True), (503, False)]
)
def test_a_hub_that_replies_answers(
    no_memory: None, monkeypatch: pytest.MonkeyPatch, status: int, answers: bool
) -> None:
    handler = type("Handler", (_Handler,), {"status": status})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        assert hub.hub_answers() is answers
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert hub.hub_answers() is False
        monkeypatch.delenv("HF_HUB_OFFLINE")
        server.shutdown()
    assert hub.hub_answers() is answers, "asked once a process"


def test_a_silent_hub_is_passed_over_within_the_time_given(
    no_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, never says a word
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        assert hub.hub_answers(timeout_s=0.3) is False
        assert hub.hub_answers() is False
        assert time.monotonic() - start < 1.5
    monkeypatch.setenv("HF_ENDPOINT", "not an address")
    assert hub.hub_answers(timeout_s=0.3) is False


def test_a_name_that_is_looked_up_for_ever_is_not_waited_for(
    no_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(20))
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    start = time.monotonic()
    assert hub.hub_answers(timeout_s=0.1) is False
    assert time.monotonic() - start < 5
    over.set()


CACHED = """
import sys
from pathlib import Path
from datasets import DatasetInfo, Features, Value, config
from datasets.arrow_writer import ArrowWriter
folder = Path(config.HF_DATASETS_CACHE) / "owner___some-rows" / "default" / "0.0.0" / "abc"
folder.mkdir(parents=True)
features = Features({"a": Value("string")})
writer = ArrowWriter(path=str(folder / "some-rows-train.arrow"), features=features)
writer.write({"a": "x"})
count, size = writer.finalize()
split = {"name": "train", "num_bytes": size, "num_examples": count, "dataset_name": "some-rows"}
names = {"builder_name": "parquet", "dataset_name": "some-rows", "config_name": "default"}
names["version"] = "0.0.0"
DatasetInfo(features=features, splits={"train": split}, **names).write_to_directory(str(folder))
from minirl.errors import UserError
from minirl.io.rows import read_dataset
print(list(read_dataset("owner/some-rows", ["a"])))
for source, split in (("owner/other", "train"), ("owner/some-rows", "test")):
    try:
        list(read_dataset(source, ["a"], split))
    except UserError as error:
        print(error)
assert not config.HF_HUB_OFFLINE and "torch" not in sys.modules
"""


@pytest.mark.slow
def test_without_a_hub_the_cache_is_read_and_the_rest_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with socket.create_server(("127.0.0.1", 0)) as server:  # the hub that never says a word
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith("HF_") and k != "TRANSFORMERS_OFFLINE"
        }
        env = kept | dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1")
        env |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": address, "PYTHONPATH": str(ROOT)}
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", CACHED],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 30
    rows, missing, split = done.stdout.splitlines()
    assert rows == "[('owner/some-rows (train), row 1', {'a': 'x'})]"
    assert missing.startswith(
        f"owner/other: split 'train' is not in the local cache and {address} does not answer; pass"
        " a local"
    )
    assert split.startswith("owner/some-rows: split 'test' is not in the local cache")
    assert "--set task.source=PATH" in split
