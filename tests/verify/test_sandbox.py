"""The sandbox: what runs, what hostile programs can do (nothing), and that it outlives kills, forks
and interrupts."""

from __future__ import annotations

import builtins
import importlib.util
import json
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from minirl.errors import UserError
from minirl.verify import sandbox
from minirl.verify.sandbox import (
    MAX_CHARS,
    MAX_DETAIL,
    Limits,
    Meter,
    Result,
    read_plain_number,
    run_program,
)

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "svamp" / "train_pcot.json"
QUICK = Limits(time_s=0.1)
# Every module of the standard library that a program can import; a version of Monty that brings
# another has to be looked at first.
IMPORTS = """
asyncio base64 binascii bisect collections copy csv dataclasses datetime decimal functools hashlib
itertools json math os
pathlib posixpath random re sys time tomllib typing unicodedata
"""


def solution(body: str) -> str:
    return "def solution():\n" + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n"


@pytest.fixture(autouse=True, scope="module")
def _closed() -> Iterator[None]:
    yield
    sandbox.close()


@pytest.mark.parametrize(
    ("source", "value"),
    [
        (solution("return 6 * 7"), 42),
        (solution("return 7 / 2"), 3.5),
        (solution("return -1 / 3"), -1 / 3),
        (solution("return 1e22"), 1e22),
        (solution("return 2 ** 200"), 2**200),
        (solution("return math.sqrt(16)"), 4.0),  # without an import, as in the paper's runs
        (solution("return ' 42 '"), 42),
        (solution("return f'{2 / 3:.2f}'"), 0.67),
        (solution("from decimal import Decimal\nreturn Decimal('1.50') + 1"), 2.5),
        (solution("print('thinking')\nreturn 3"), 3),
        (solution("import time\ntime.sleep(1000)\nreturn 5"), 5),  # nobody waits for a program
        (
            "from math import ceil\nRATE = 1.5\ndef half(x):\n    return x / 2\n"
            + solution("return ceil(half(RATE))"),
            1,
        ),
        ("count = 0\n" + solution("global count\ncount += 1\nreturn count"), 1),
        (solution("return 1") + "if __name__ == '__main__':\n    print(solution())\n", 1),
        (solution("return 1") + solution("return 2"), 2),
        # Renaming what the driver uses changes the program's names, not the driver's.
        ("repr = str = type = exec = BaseException = None\n" + solution("return 4"), 4),
    ],
)
def test_a_program_gives_its_number(source: str, value: float) -> None:
    result = run_program(source)
    assert result == Result(value)
    assert type(result.value) is type(value)


@pytest.mark.parametrize(
    "returned",
    """
    None;True;3j;[3];(1, 2);{'a': 1};'3/4';'$5';'1,000';'5 apples';'';float('nan');-float('inf')
    1e400;10 ** 309;10 ** 500;math;print
    solution;'9' * 401;'1e999';b'1';'1_000';'٣';lambda: 1
    """.strip()
    .replace("\n    ", ";")
    .split(";"),
)
def test_anything_else_is_no_number(returned: str) -> None:
    result = run_program(solution(f"return {returned}"))
    assert (result.value, result.error) == (None, "no_number")
    assert result.detail.startswith("returned ")
    assert len(result.detail) <= MAX_DETAIL + len("returned ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-0.5", -0.5),
        ("'+7'", 7),
        ("5.", 5.0),
        (".5", 0.5),
        ("1e+22", 1e22),
        ("Decimal('1E+3')", 1000.0),
        ("9" * 308, int("9" * 308)),
    ]
    + [
        (text, None)
        for text in (
            "",
            "'",
            "True",
            "nan",
            "inf",
            "1e999",
            "9" * 309,
            "0" * 5000,
            "0x10",
            "1/2",
            "--1",
            "1 2",
            "1e",
            "4\n5",
        )
    ],
)
def test_plain_numbers(text: str, value: float | None) -> None:
    found = read_plain_number(text)
    assert (found, type(found)) == (value, type(value))


CLASS = "class A:\n    def {0}(self, *rest):\n        {1}\n"
DEEP = "x = []\nfor _ in range(100000): x = [x]\n"
NESTED = "".join(" " * i + "def f():\n" for i in range(60)) + " " * 60 + "pass\n"

# name: (program, error kind). Where the body is one expression, it is what solution() returns.
HOSTILE: dict[str, tuple[str, str]] = {
    # out of the sandbox
    "fork bomb": (solution("import os\nwhile True: os.fork()"), "program_error"),
    "os.system": (solution("import os\nreturn os.system('touch {canary}')"), "program_error"),
    "os.popen": (solution("import os\nreturn os.popen('touch {canary}').read()"), "program_error"),
    "os.environ": (solution("import os\nreturn len(os.environ)"), "program_error"),
    "os.kill": (solution("import os\nos.kill(os.getppid(), 9)"), "program_error"),
    "os.open": (solution("import os\nos.open('{canary}', os.O_CREAT)"), "program_error"),
    "subprocess": (
        solution("import subprocess\nreturn subprocess.run(['touch', '{canary}']).returncode"),
        "program_error",
    ),
    "socket": (
        solution("import socket\nsocket.create_connection(('127.0.0.1', 80))"),
        "program_error",
    ),
    "urllib": (
        solution("import urllib.request\nurllib.request.urlopen('http://127.0.0.1')"),
        "program_error",
    ),
    "ctypes": (solution("import ctypes\nctypes.string_at(0)"), "program_error"),
    "signal": (solution("import signal\nsignal.raise_signal(9)"), "program_error"),
    "threads": (
        solution("import threading\nwhile True: threading.Thread(target=solution).start()"),
        "program_error",
    ),
    "multiprocessing": (
        solution("import multiprocessing\nmultiprocessing.Process(target=solution).start()"),
        "program_error",
    ),
    "file read": (solution("return len(open('/etc/passwd').read())"), "program_error"),
    "file write": (solution("open('{canary}', 'w').write('x')"), "program_error"),
    "pathlib write": (
        solution("import pathlib\npathlib.Path('{canary}').write_text('x')"),
        "program_error",
    ),
    "folder list": (solution("import os\nreturn len(os.listdir('/'))"), "program_error"),
    "own process": (solution("return len(open('/proc/self/maps').read())"), "program_error"),
    "__import__": (solution("return __import__('os').system('touch {canary}')"), "program_error"),
    "importlib": (
        solution("import importlib\nimportlib.import_module('os').system('touch {canary}')"),
        "program_error",
    ),
    "builtins": (solution("return __builtins__['open']('{canary}', 'w')"), "program_error"),
    "sys.modules": (
        solution("import sys\nsys.modules['os'].system('touch {canary}')"),
        "program_error",
    ),
    "__subclasses__": (
        solution("return ().__class__.__bases__[0].__subclasses__()"),
        "program_error",
    ),
    "__globals__": (solution("return solution.__globals__['__builtins__']"), "program_error"),
    "__code__": (
        solution("solution.__code__ = solution.__code__.replace(co_code=b'')"),
        "program_error",
    ),
    "frames": (
        solution(
            "try: 1 / 0\nexcept Exception as e: return e.__traceback__.tb_frame.f_back.f_globals"
        ),
        "program_error",
    ),
    "inner exec": (solution("exec('import os; os.system(\"touch {canary}\")')"), "program_error"),
    "pickle": (
        solution(
            "import pickle\nreturn pickle.loads(b'cos\\nsystem\\n(S\"touch {canary}\"\\ntR.')"
        ),
        "program_error",
    ),
    "exit": (solution("raise SystemExit"), "program_error"),
    "interrupt": (solution("raise KeyboardInterrupt"), "program_error"),
    "input": (solution("return input()"), "program_error"),
    # time
    "endless loop": (solution("while True: pass"), "timeout"),
    "endless at import": ("while True: pass\n" + solution("return 1"), "timeout"),
    "sleep loop": (solution("import time\nwhile True: time.sleep(1000)"), "timeout"),
    "clock loop": (
        solution("import time\nend = time.time() + 9\nwhile time.time() < end: pass"),
        "timeout",
    ),
    "swallowed time-out": (
        solution("while True:\n  try:\n    while True: pass\n  except BaseException: pass"),
        "timeout",
    ),
    "swallowed errors": (
        solution("while True:\n  try: raise ValueError\n  finally: continue"),
        "timeout",
    ),
    "recursion, swallowed": (
        solution("def f(): f()\nwhile True:\n  try: f()\n  except RecursionError: pass"),
        "timeout",
    ),
    "exponential recursion": (
        solution("def f(n): return f(n - 1) + f(n - 1) if n else 1\nreturn f(60)"),
        "timeout",
    ),
    "long range": (solution("return sum(range(10 ** 12))"), "timeout"),
    "giant power": (solution("return 10 ** 10 ** 7 % 7"), "timeout"),
    "giant product": (solution("x = 3 ** 3 ** 15\nreturn x * x * x % 7"), "timeout"),
    "giant factorial": (solution("return math.factorial(10 ** 7) % 7"), "timeout"),
    "giant decimals": (
        solution(
            "import decimal\ndecimal.getcontext().prec = 10 ** 6\nreturn decimal.Decimal(2).sqrt()"
        ),
        "timeout",
    ),
    "hostile comparison": (
        CLASS.format("__eq__", "while True: pass") + solution("return A() == A()"),
        "timeout",
    ),
    "hostile result": (
        CLASS.format("__repr__", "while True: pass") + solution("return A()"),
        "timeout",
    ),
    "deep source": (NESTED + solution("return 1"), "timeout"),
    "hashing": (
        solution("import hashlib\nreturn hashlib.pbkdf2_hmac('sha256', b'a', b'b', 10 ** 9)"),
        "timeout",
    ),
    # memory and output
    "output flood": (solution("while True: print('a' * 10000)"), "memory"),
    "one long line": (solution("print('a' * 10 ** 6)\nreturn 1"), "memory"),
    "list bomb": (solution("x = [1]\nwhile True: x += x"), "memory"),
    "dictionary bomb": (solution("x = {}\nwhile True: x[len(x)] = 'a' * 1000"), "memory"),
    "memory bomb, swallowed": (
        solution("while True:\n  try: x = 'a' * 10 ** 10\n  except BaseException: pass"),
        "memory",
    ),
    "text bomb": (solution("return 'a' * 10 ** 10"), "memory"),
    "bytes bomb": (solution("return len(bytes(10 ** 10))"), "memory"),
    "list of a range": (solution("return list(range(10 ** 12))"), "memory"),
    "format bomb": (solution("return '%0999999999d' % 3"), "memory"),
    "f-string bomb": (solution("return f'{3:0999999999d}'"), "memory"),
    "replace bomb": (solution("return ('a' * 10 ** 6).replace('a', 'b' * 1000)"), "memory"),
    "shift bomb": (solution("return (1 << 10 ** 9) % 7"), "memory"),
    "giant integer": (solution("return 10 ** 10 ** 8"), "memory"),
    "squares": (solution("x = 2\nwhile True: x *= x"), "memory"),
    "arguments bomb": (solution("def f(*a): return f(*a, *a)\nreturn f(1, 2)"), "memory"),
    "product bomb": (
        solution("import itertools\nreturn list(itertools.product(range(100), repeat=10))"),
        "memory",
    ),
    "long error": (solution("raise ValueError('a' * (60 << 20))"), "memory"),
    # depth
    "recursion": (solution("return solution()"), "program_error"),
    "hostile repr": (
        CLASS.format("__repr__", "return repr(self)") + solution("return A()"),
        "program_error",
    ),
    "hostile attribute": (
        CLASS.format("__add__", "return self + self") + solution("return A() + A()"),
        "program_error",
    ),
    "hostile hash": (
        CLASS.format("__hash__", "return hash(self)") + solution("return {A(): 1}"),
        "program_error",
    ),
    "hostile iterator": (
        CLASS.format("__iter__", "return iter(self)") + solution("return list(A())"),
        "program_error",
    ),
    "failing repr": (
        CLASS.format("__repr__", "raise ValueError") + solution("return A()"),
        "program_error",
    ),
    "deep comparison": (solution(DEEP + "return x == x[0]"), "program_error"),
    "deep copy": (solution(DEEP + "import copy\nreturn copy.deepcopy(x)"), "program_error"),
    "deep result": (solution(DEEP + "return x"), "no_number"),
    "circular result": (solution("x = []\nx.append(x)\nreturn x"), "no_number"),
    "deep brackets": (solution("return " + "(" * 20000 + ")" * 20000), "program_error"),
    "deep signs": (solution("return " + "-" * 50000 + "1"), "program_error"),
    "long sum": (solution("return 1" + " + 1" * 10000), "program_error"),
    "deep JSON": (solution("import json\nreturn json.loads('[' * 10 ** 5)"), "program_error"),
    "deep eval": (solution("return eval('f()', {'f': solution})"), "program_error"),
    "regex backtracking": (
        solution("import re\nreturn re.match(r'(?=(a+)+b)(a|aa)+\\1$', 'a' * 60)"),
        "program_error",
    ),
    "regex size": (
        solution("import re\nreturn re.compile('(?:a{0,1000}){0,1000}b')"),
        "program_error",
    ),
    "hostile sort": (
        CLASS.format("__lt__", "return sorted([A(), A()])") + solution("return sorted([A(), A()])"),
        "program_error",
    ),
    # text that is no program
    "nothing": ("", "program_error"),
    "no solution": ("x = 1\n", "program_error"),
    "not callable": ("solution = 3\n", "program_error"),
    "wants arguments": ("def solution(x):\n    return x\n", "program_error"),
    "syntax": ("def solution(:\n", "program_error"),
    "NUL": (solution("return 1\x00"), "program_error"),
    "lone surrogate": (solution("return '\ud800'"), "program_error"),
    "too long": (solution("return 1") + "#" * MAX_CHARS, "program_error"),
    "long digits": (solution("return " + "9" * 20000), "program_error"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_contained(name: str, tmp_path: Path) -> None:
    source, kind = HOSTILE[name]
    canary = tmp_path / "canary"
    # Only what is meant to run out of time has little of it; a flood of output is found out when
    # its time is over.
    limits = QUICK if kind == "timeout" or name == "output flood" else Limits(time_s=5.0)
    first = helper()
    result = run_program(source.replace("{canary}", str(canary)), limits=limits)
    assert helper() == first, "Monty's process was ended in its time, or the helper would have been"
    assert (result.value, result.error) == (None, kind), result
    assert len(result.detail) <= MAX_DETAIL + len("returned ")
    assert "\n" not in result.detail
    assert not canary.exists()
    assert run_program(solution("return 6 * 7")) == Result(42)


def test_what_comes_back_is_small() -> None:
    run_program(solution("return 1"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run_program(solution("return 'a' * 2 * 10 ** 7")) == Result(
        None, "no_number", "returned '" + "a" * (MAX_DETAIL - 1)
    )
    assert run_program(solution("raise ValueError('a' * 10 ** 7)")) == Result(
        None, "program_error", "ValueError: " + "a" * (MAX_DETAIL - 12)
    )
    assert run_program(solution("return list(range(10 ** 5))")).detail.startswith(
        "returned [0, 1, 2"
    )
    assert run_program(solution("print('a' * 60000)\nreturn 1")) == Result(1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10  # KiB


def test_limits_are_those_given() -> None:
    small, large = Limits(memory_mb=8), Limits(memory_mb=256)
    source = solution("return len([0] * 2 * 10 ** 6)")
    assert run_program(source, limits=small).error == "memory"
    assert run_program(source, limits=large) == Result(2 * 10**6)
    loop = solution("x = 0\nfor i in range(10 ** 6): x += i\nreturn x")
    assert run_program(loop, limits=Limits(time_s=0.001)).error == "timeout"
    assert run_program(loop, limits=Limits(time_s=20)) == Result(sum(range(10**6)))
    chatty = solution("print('a' * 3000)\nreturn 1")
    assert run_program(chatty, limits=Limits(output_kb=1)).error == "memory"
    assert run_program(chatty, limits=Limits(output_kb=4)) == Result(1)


def test_a_result_depends_on_the_program_alone() -> None:
    clock = (
        "import time, datetime, random\nreturn time.time() + datetime.datetime.now().timestamp() +"
        " random.random()"
    )
    first, second = run_program(solution(clock)), run_program(solution(clock))
    assert first.value is not None
    assert first == second
    run_program("leak = 5\nimport math\nmath.pi = 3\n" + solution("return leak"))
    assert run_program(solution("return leak")).error == "program_error"
    assert run_program(solution("return math.pi")) == Result(math.pi)


def test_imports_are_an_allow_list() -> None:
    names = sorted(
        sys.stdlib_module_names
        | {"numpy", "sympy", "pandas", "scipy", "requests", "torch", "minirl", "pip", "cffi"}
    )
    probe = (
        f"found = []\nfor name in {names}:\n  try: exec('import ' + name)\n  except ImportError:"
        " continue\n  found.append(name)\n"
    )
    allowed = IMPORTS.split()
    assert run_program(
        solution(probe + f"return len([name for name in found if name not in {allowed}])")
    ) == Result(0)
    assert run_program(solution(probe + "return len(found)")) == Result(len(allowed))


@pytest.mark.slow
def test_every_svamp_program_gives_its_answer() -> None:
    if not DATA.exists():
        pytest.skip(f"no {DATA.name} in ../shared/data")
    rows = json.loads(DATA.read_text(encoding="utf-8"))
    results = [(row, run_program(row["answer_cot"])) for row in rows]
    right = [
        row
        for row, result in results
        if result.value is not None and abs(result.value - float(row["answer_value"])) <= 1e-2
    ]
    assert (len(right), len(rows)) == (3043, 3043)


# What the machine may do to it


def helper() -> int:
    sandbox.require()
    assert sandbox._helper.pid is not None
    return sandbox._helper.pid


def interpreters(of: int) -> list[int]:
    """The processes that the helper started."""
    return [int(child) for child in Path(f"/proc/{of}/task/{of}/children").read_text().split()]


on_linux = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="reads /proc, which is Linux's"
)


@on_linux
def test_the_interpreter_has_the_kernels_limits_and_no_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sandbox.close()
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert run_program(solution("return 1"), limits=Limits(memory_mb=32)) == Result(1)
    (interpreter,) = interpreters(helper())
    limits = {
        line[:26].strip(): line[26:].split()[0]
        for line in Path(f"/proc/{interpreter}/limits").read_text().splitlines()
    }
    assert (limits["Max core file size"], limits["Max file size"]) == ("0", "0")
    assert limits["Max data size"] == str((2 * 32 + 128) << 20)
    assert b"secret" not in Path(f"/proc/{interpreter}/environ").read_bytes()


def test_it_outlives_a_killed_helper() -> None:
    first = helper()
    os.kill(first, signal.SIGKILL)
    assert run_program(solution("return 1")) == Result(1)
    assert helper() != first


@on_linux
def test_it_outlives_a_killed_interpreter() -> None:
    sandbox.close()
    first = helper()
    run_program(solution("return 1"))
    for interpreter in interpreters(first):
        os.kill(interpreter, signal.SIGKILL)
    assert run_program(solution("return 2")) == Result(2)
    assert helper() == first


def test_a_helper_that_does_not_answer_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SLACK_S", 0.1)
    first = helper()
    os.kill(first, signal.SIGSTOP)
    assert run_program(solution("return 1"), limits=QUICK) == Result(1)
    assert helper() != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


@pytest.mark.slow
@on_linux
def test_a_program_whose_interpreter_gets_no_processor_runs_again() -> None:
    """It stands still for all its time, as on a loaded machine, and is killed. Catches: a verdict
    by wall-clock."""
    sandbox.close()
    run_program(solution("return 1"))
    (interpreter,) = interpreters(helper())
    os.kill(interpreter, signal.SIGSTOP)
    assert run_program(solution("return 6 * 7"), limits=Limits(time_s=0.2)) == Result(42)


@on_linux
def test_a_program_that_is_late_for_want_of_a_processor_runs_again() -> None:
    """It stands still in the middle, and goes on when its time is over: Monty itself stops it."""
    sandbox.close()
    run_program(solution("return 1"))
    (interpreter,) = interpreters(helper())

    def send(number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(interpreter, number)

    timers = [
        threading.Timer(0.03, send, (signal.SIGSTOP,)),
        threading.Timer(1.1, send, (signal.SIGCONT,)),
    ]
    for timer in timers:
        timer.start()
    loop = "x = 0\nfor i in range(10 ** 6): x += i\nreturn x"
    assert run_program(solution(loop), limits=Limits(time_s=1.0)) == Result(sum(range(10**6)))
    for timer in timers:
        timer.join()
    sandbox.close()


@pytest.mark.parametrize(
    ("kind", "used_s", "patience", "found"),
    [
        ("timeout", 2.0, 1, "timeout"),
        ("timeout", 1.6, 1, "timeout"),
        ("timeout", 1.5, 1, "starved"),
        ("timeout", 0.0, 1, "starved"),
        ("timeout", None, 1, "timeout"),  # not known: macOS
        ("ok", 0.1, 1, "ok"),
        ("memory", 0.1, 1, "memory"),
        ("died", 0.0, 1, "died"),
        ("ok", 1.9, sandbox.PATIENCE, "ok"),
        ("ok", 2.1, sandbox.PATIENCE, "timeout"),
        ("program_error", 2.1, sandbox.PATIENCE, "timeout"),
        ("timeout", 0.5, sandbox.PATIENCE, "timeout"),  # once is enough
        ("ok", None, sandbox.PATIENCE, "ok"),
    ],
)
def test_cpu_seconds_decide(kind: str, used_s: float | None, patience: int, found: str) -> None:
    assert sandbox._judge_by_cpu(kind, used_s, 2.0, patience) == found


@on_linux
def test_cpu_seconds_are_counted_of_the_living_and_of_the_killed() -> None:
    """Catches: the seconds of earlier programs counted, those of a killed process lost."""
    burn = "import time\nwhile time.process_time() < {}: pass\nprint(flush=True)\n"
    code = burn.format(0.1) + "input()\n" + burn.format(0.3) + "input()"
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdout.readline()
    meter = Meter(child.pid)
    assert meter.used_s() == pytest.approx(0.0, abs=0.05)
    child.stdin.write(b"\n")
    child.stdin.flush()
    child.stdout.readline()
    assert meter.used_s() == pytest.approx(0.2, abs=0.05)
    child.kill()
    child.wait()
    assert meter.used_s() == pytest.approx(0.2, abs=0.05)
    assert Meter(None).used_s() is None
    child.stdin.close()
    child.stdout.close()


def gone(group: int, within_s: float = 5.0) -> bool:
    """Whether no process is left of a helper and what it started."""
    deadline = time.perf_counter() + within_s
    while time.perf_counter() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_an_interrupt_stops_the_program_and_loses_no_answer() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    first = helper()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            run_program(NESTED + solution("return 1"), limits=Limits(time_s=60))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert run_program(solution("return 5")) == Result(5)
    assert gone(first)


def test_threads_get_their_own_answers() -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: run_program(solution(f"return {i} * 2")).value, range(100)))
    assert found == list(range(0, 200, 2))


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    """A fresh process in which `run(body)` is the value of that body."""
    head = (
        "import os, sys\nfrom minirl.verify.sandbox import *\nfrom minirl.verify import sandbox\n"
    )
    head += "def run(body): return run_program('def solution():\\n    ' + body).value\n"
    paths = os.pathsep.join(filter(None, [str(Path(sandbox.__file__).parents[2]), *sys.path]))
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_is_safe_under_fork() -> None:
    code = """
    require()
    first = sandbox._helper.pid
    child = os.fork()
    if child == 0:
        print(run("return 2"), sandbox._helper.pid != first, flush=True)
        sys.exit(0)
    print(os.waitpid(child, 0)[1], run("return 3"), sandbox._helper.pid == first)
    """
    out, err = python(code).communicate(timeout=20)
    assert (out.split(), err) == (["2", "True", "0", "3", "True"], "")


def test_several_processes_run_at_once() -> None:
    processes = [python("print(sum(run(f'return {i}') for i in range(50)))") for _ in range(2)]
    assert [process.communicate(timeout=20) for process in processes] == [("1225\n", "")] * 2


def test_nothing_is_left_behind_by_a_killed_run() -> None:
    code = f"""
    require()
    run("return 1")
    print(sandbox._helper.pid, flush=True)
    run_program({NESTED + solution("return 1")!r}, limits=Limits(time_s=0.2))
    while True: run_program({solution("while True: pass")!r}, limits=Limits(time_s=0.2))
    """
    process = python(code)
    assert process.stdout is not None
    group = int(process.stdout.readline())
    os.killpg(group, 0)  # there is such a group
    process.kill()
    process.communicate(timeout=5)
    assert gone(group)


def test_nothing_is_printed_and_the_exit_is_quiet() -> None:
    # The last makes Monty's process end itself, which it says on stderr.
    process = python(
        "print(run('print(9); return 2'), run('raise ValueError(\\'a\\' * (60 << 20))'))"
    )
    assert process.communicate(timeout=20) == ("2 None\n", "")
    assert process.returncode == 0


# Where it cannot run


def test_a_missing_package_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.close()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for ask in (sandbox.require, lambda: run_program(solution("return 1"))):
        with pytest.raises(
            UserError,
            match=r"pydantic-monty is not installed.*pip install 'pydantic-monty>=1.4,<2'",
        ):
            ask()


def test_a_missing_interpreter_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.close()
    monkeypatch.setenv("MONTY_BIN", "/nowhere/monty")
    with pytest.raises(
        UserError, match=r"pydantic-monty does not run \(.*/nowhere/monty.*pip install"
    ) as caught:
        run_program(solution("return 1"))
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("MONTY_BIN")
    assert run_program(solution("return 1")) == Result(1)


# Any text


@contextmanager
def sealed() -> Iterator[None]:
    """Inside, this process can compile, execute, open and start nothing."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the sandbox did something in this process")

    sandbox.require()
    with (
        patch.multiple(builtins, eval=refuse, exec=refuse, compile=refuse, open=refuse),
        patch.object(subprocess, "Popen", refuse),
    ):
        yield


WORDS = """
def solution ( ) : return import os os.system ('touch /canary') open while True for x in range if
else try except raise class lambda yield
del x = 1 + - * ** // % [ ] { } , . ' " \\ # @ async await global nonlocal None 0 9999 1e999
"""
TOKENS = st.sampled_from([*WORDS.split(), "\n", "\n    ", "\n        ", "\x00", "\ud800"])
PROGRAMS = st.one_of(
    st.text(max_size=200),
    st.lists(TOKENS, max_size=40).map(" ".join),
    st.lists(TOKENS, max_size=20).map(
        lambda words: "def solution():\n    return " + " ".join(words)
    ),
    st.binary(max_size=100).map(lambda data: data.decode("latin-1")),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(source=PROGRAMS)
@example(source="def solution():\n    return 1")
def test_any_text_gives_a_result(source: str) -> None:
    with sealed():
        first = helper()
        result = run_program(source, limits=QUICK)
        assert helper() == first
    assert (result.value is None) == (result.error is not None)
    assert result.value is None or math.isfinite(result.value)
    assert "\n" not in result.detail
    assert not Path("/canary").exists()
