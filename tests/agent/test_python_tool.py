from __future__ import annotations

import asyncio
import time

import pytest

from open_agentrl_jax.agent.environment import ToolEnvironment, ungraded
from open_agentrl_jax.agent.python_tool import SHOW, PythonTool, prepare_code, shorten_tracebacks
from open_agentrl_jax.sandbox import probes
from open_agentrl_jax.sandbox.client import Result
from open_agentrl_jax.types import Message, ToolCall, UserError


@pytest.fixture(scope="module")
def sandbox():
    try:
        executor = probes.open_embedded()
    except UserError as error:
        pytest.skip(str(error))
    yield executor
    executor.stop()


async def call(tool: PythonTool, code, session: str = ""):
    return await tool(ToolCall("code_interpreter", {"code": code}), session=session)


async def printed(sandbox, code: str, mode: str = "robust") -> str:
    result = await sandbox.run(prepare_code(code, mode=mode))
    return result.stdout if result.return_code == 0 else result.stderr.splitlines()[-1]


SHOWN = {
    "1 + 1": "2\n",
    "x = 3\nx; x * 2": "6\n",
    "(1,\n 'é')  # a comment": "(1, 'é')\n",
    "*[1], 2": "(1, 2)\n",
    "'text'": "'text'\n",
    "print('a')": "a\n",
    "None": "",
    "x = 5": "",
    "for i in range(2):\n    i": "",
    "def f():\n    return 1\nf()": "1\n",
    "import math": "",
    "1 # ; not a semicolon": "1\n",
    "1;": "",
    "(y := 4)": "4\n",
    "a = 1\n\n# the end\n": "",
    "a = '''```python\nx\n```'''\na": "'```python\\nx\\n```'\n",
    "```python\n2 + 2\n```": "4\n",
    "```py\r\nx = 1\r\nx\r\n```\r\n": "1\n",
    "```\n7\n": "7\n",
    "Here it is:\n```python\na = 2\n```\nand then\n```python\na * 3\n```\nDone.": "6\n",
    "[x for x in range(3)]": "[0, 1, 2]\n",
    "lambda: 0\n5 if True else \\\n 6": "5\n",
    "if True: 3": "",
    "é = 'ü'; é + 'ß' * 2": "'üßß'\n",
    "": "",
}


@pytest.mark.parametrize("code", SHOWN)
async def test_the_last_value_is_printed_as_a_notebook_would(sandbox, code):
    assert await printed(sandbox, code) == SHOWN[code]


@pytest.mark.parametrize("code", [c for c in SHOWN if "```" not in c])
async def test_what_ran_before_still_runs(sandbox, code):
    plain = await sandbox.run(code)
    assert plain.return_code == 0
    assert (await sandbox.run(prepare_code(code))).return_code == 0


@pytest.mark.parametrize("code", ["x = = 1", "print(", "```python", "\0", "x" * 300_000, "(" * 3000])
def test_what_cannot_be_parsed_is_left_alone(code):
    assert prepare_code(code) == code


@pytest.mark.parametrize(
    "work",
    [
        lambda: prepare_code("```" + " " * 200_000 + "x"),
        lambda: prepare_code(" " * 200_000 + "``"),
        lambda: shorten_tracebacks(
            'Traceback (most recent call last):\n  File "main.py", line 1, in <module>\n    '
            + "__import__('sys').displayhook((\n    " + "~" * 60_000 + "x\n"
        ),
        lambda: shorten_tracebacks('  File "main.py", line 1\n' + " " * 60_000 + "x"),
    ],
)  # fmt: skip
def test_text_made_to_keep_us_busy_does_not(work):
    started = time.process_time()
    work()
    assert time.process_time() - started < 1


def test_line_numbers_stay():
    code = "a = 1\n\nb = [\n  1,\n]\nb[\n 3]\n"
    assert prepare_code(code).count("\n") == code.count("\n")


@pytest.mark.parametrize(
    ("code", "prepared"),
    [
        ("x = 3", "print(x = 3)"),
        ("for i in a:\n    i", "for i in a:\nprint(    i)"),
        ("import os", "print(import os)"),
        ("1 # one", "print(1 # one)"),
        ("a;b", "print(a;b)"),
        ("print(1)\n", "print(1)\n"),
        ("1\n\n", "print(1)\n\n"),
        ("say ```python\n5\n``` so", "print(5)"),
    ],
)
def test_reference_mode_has_the_fault_and_robust_has_not(code, prepared):
    assert prepare_code(code, mode="reference") == prepared
    assert prepare_code(code) != prepared or code.startswith("print")


async def test_robust_runs_what_reference_breaks(sandbox):
    for code in ("x = 3", "for i in [1]:\n    i", "import os", "1 # one", "a = 1; a"):
        assert (await sandbox.run(prepare_code(code, mode="reference"))).return_code == 1
        assert (await sandbox.run(prepare_code(code))).return_code == 0


async def test_tracebacks_are_shortened_to_the_models_own_frames(sandbox):
    result = await call(PythonTool(sandbox), "import json\ndef f(x):\n    return json.loads(x)\nf('{')")
    assert result.status == "error"
    lines = result.text.splitlines()
    frames = [line for line in lines if line.startswith("  File")]
    assert frames == ['  File "main.py", line 4, in <module>', '  File "main.py", line 3, in f']
    assert lines[-1].startswith("json.decoder.JSONDecodeError") and SHOW not in result.text and "    f('{')" in lines


def test_chained_tracebacks_of_other_servers_files():
    text = (
        'Traceback (most recent call last):\n  File "/tmp/x/prog.py", line 1, in <module>\n    a()\n'
        '  File "/usr/lib/lib.py", line 9, in a\n'
        "    b()\n    ^^^\nKeyError: 'k'\n\nDuring handling of the above exception, another exception occurred:\n\n"
        'Traceback (most recent call last):\n  File "/tmp/x/prog.py", line 3, in <module>\n    c()\nValueError: v\n'
    )
    short = shorten_tracebacks(text)
    assert (
        "/usr/lib" not in short
        and short.count("prog.py") == 2
        and "KeyError: 'k'" in short
        and short.endswith("ValueError: v\n")
    )
    assert shorten_tracebacks("no traceback\n  at all") == "no traceback\n  at all"


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("while True: pass", "error", "longer than 1 seconds"),
        ("print('begun')\nwhile True: pass", "error", "begun\nStopped: the program ran longer"),
        ("bytearray(1 << 30)", "error", "more than 200 MiB of memory"),
        ("x = 1", "ok", "ended without output"),
        ("import sys\nsys.exit(4)", "error", "Exit code 4."),
        ("import os\nos.abort()", "error", "Stopped by signal SIGABRT."),
        ("print(1)", "ok", "1"),
    ],
)
async def test_ends_are_told_in_words(sandbox, code, status, words):
    result = await call(PythonTool(sandbox, timeout=1, memory_mb=200), code)
    assert result.status == status and words in result.text


async def test_a_call_without_code_is_the_models_error(sandbox):
    tool = PythonTool(sandbox)
    assert (await tool(ToolCall("code_interpreter", {}))).status == "error"
    assert (await call(tool, 5)).status == "error"
    assert (await tool(ToolCall(error="not JSON"))).text == "not JSON"


class Broken:
    metadata: dict = {}  # noqa: RUF012

    async def run(self, code, **_):
        return Result("infrastructure", None, "", "secret host name", 0.0)


async def test_infrastructure_is_never_the_models_error():
    result = await call(PythonTool(Broken()), "1")  # type: ignore[arg-type]
    assert result.status == "infrastructure" and "secret" not in result.text


async def test_a_persistent_session_keeps_its_variables(sandbox):
    tool = PythonTool(sandbox, timeout=10, persistent=True)
    texts = [
        (await call(tool, code, "a")).text
        for code in ("x = 3\nprint('loud')\nx", "x += 1\nx", "1 / 0", "def f(): return x / 0\nf()", "x")
    ]
    assert texts[0] == "loud\n3" and texts[1] == texts[4] == "4"
    assert texts[2].splitlines()[1:2] == ['  File "<cell 3>", line 1, in <module>'] and "child.py" not in texts[2]
    assert texts[3].count("<cell 4>") == 2
    ended = (await call(tool, "import os\nos._exit(0)", "a")).text
    assert "its variables are gone" in ended and "NameError" in (await call(tool, "x", "a")).text
    assert "NameError" in (await call(tool, "x", "b")).text
    assert "NameError" in (await call(PythonTool(sandbox), "x", "a")).text
    for name in ("a", "b", "never opened"):
        await tool.release(name)
    assert not sandbox.sessions


async def test_a_stopped_call_keeps_the_variables(sandbox):
    tool = PythonTool(sandbox, timeout=0.7, memory_mb=200, persistent=True)
    await call(tool, "x = 1", "a")
    assert "longer than" in (await call(tool, "x = 2\nwhile True: pass", "a")).text
    assert "more than 200 MiB" in (await call(tool, "bytearray(1 << 30)", "a")).text
    assert (await call(tool, "x", "a")).text == "2"
    await tool.release("a")


async def test_an_environment_ends_the_sessions_of_its_episode(sandbox):
    tool = PythonTool(sandbox, persistent=True)
    environment = ToolEnvironment([tool], ungraded, session="a")
    await environment.step(Message("assistant", "", [ToolCall("code_interpreter", {"code": "x = 1"})]))
    assert len(sandbox.sessions) == 1
    await environment.close()
    assert not sandbox.sessions


async def test_sessions_at_once(sandbox):
    tool = PythonTool(sandbox, persistent=True)
    await asyncio.gather(*(call(tool, f"x = {i}", f"s{i}") for i in range(8)))
    assert [(await call(tool, "x", f"s{i}")).text for i in range(8)] == [str(i) for i in range(8)]
    await asyncio.gather(*(tool.release(f"s{i}") for i in range(8)))


def test_the_schema_says_whether_state_is_kept(sandbox):
    assert "afresh" in PythonTool.schema["function"]["description"]
    assert "still there" in PythonTool(sandbox, persistent=True).schema["function"]["description"]
    assert PythonTool.schema["function"]["name"] == PythonTool.name
