"""Foreign agents: real commands and functions that talk to the capturing endpoint, good and bad ones."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from configs.agents import calculator
from open_agentrl_jax.agent import harness as harnesses
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.episode import Budget
from open_agentrl_jax.agent.harness import Harness
from open_agentrl_jax.agent.transcript import Chats, Transcript
from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.sandbox import confine
from open_agentrl_jax.serve.capture import Capture
from open_agentrl_jax.types import Message, Sampling, Score, Task
from tests.serve.speaker import Speaker

TASK = Task("t", [Message("user", "Ada has 3 bags of 4. How many?")], "12")
CALL = '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(3 * 4)"}}\n</tool_call>'
# A client without packages, for clients that misbehave: `ask(field=value)` returns (status, body).
CLIENT = """
import json, os, sys, time, urllib.request, urllib.error
def ask(**fields):
    body = {"model": "policy", "messages": [{"role": "user", "content": "Hello"}], **fields}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
"""


async def reward(task, text):
    right = text.strip().endswith(task.answer)
    reward.seen = task.extra
    return Score(1.0 if right else -1.0, float(right), text)


async def play(
    tokenizer,
    engine_texts,
    *,
    command="",
    function=None,
    variables=(),
    task=TASK,
    seconds=30.0,
    reward=reward,
    turns=8,
    room=300,
):
    chat = Chat(tokenizer)
    capture, engine = Capture(), Speaker(chat, *engine_texts)
    transcript = Transcript(engine, Chats(chat), Sampling(0), Budget(turns, room), max_prompt=room, session="s")
    try:
        harness = Harness(command, function, variables)
        return await harnesses.play(harness, capture, transcript, task, reward, seconds=seconds)
    finally:
        await capture.close()


def script(tmp_path, body):
    path = tmp_path / "agent.py"
    path.write_text(CLIENT + body)
    return f"{sys.executable} -S {path}"


async def test_a_script_with_the_openai_package_is_played_and_graded(tokenizer):
    command = f"{sys.executable} configs/agents/calculator.py"
    made = await play(tokenizer, [f"Let me see. {CALL}", "So it is 12"], command=command)
    assert (made.stop, made.reward, made.accuracy) == ("answer", 1.0, 1.0), made.error
    (sequence,) = made.sequences
    assert [turn.tool_outputs for turn in sequence.turns] == [["12"], []]
    assert reward.seen["exit_status"] == 0 and reward.seen["output"] == "So it is 12\n"
    assert made.metrics["retokenised"] == made.metrics["trained_twice"] == 0
    assert not os.path.exists(reward.seen["directory"])


async def test_an_agent_may_be_a_function_of_this_process(tokenizer):
    made = await play(tokenizer, [CALL, "So it is 12"], function=calculator.agent)
    assert (made.stop, made.accuracy, made.metrics["tool_calls"]) == ("answer", 1.0, 1.0)

    async def raising(task, access, directory):
        raise RuntimeError("mistake of the agent")

    made = await play(tokenizer, [], function=raising)
    assert made.stop == "error" and "mistake of the agent" in made.error and made.aborted


async def test_files_go_in_and_come_back_to_the_grader(tokenizer, tmp_path):
    async def by_file(task, text):
        with open(os.path.join(task.extra["directory"], "fixed.txt")) as file:
            return Score(1.0, float(file.read() == "was broken"))

    body = "ask(); open('fixed.txt', 'w').write('was ' + open('src/bug.txt').read())"
    task = Task("t", TASK.messages, "", extra={"files": {"src/bug.txt": "broken"}})
    made = await play(tokenizer, ["ok"], command=script(tmp_path, body), task=task, reward=by_file)
    assert (made.stop, made.accuracy) == ("answer", 1.0), made.error
    task = Task("t", TASK.messages, "", extra={"files": {"../up.txt": "x"}})
    with pytest.raises(ValueError, match="outside the working directory"):
        await play(tokenizer, [], command=script(tmp_path, ""), task=task)


@pytest.mark.parametrize(
    ("body", "texts", "stop", "accuracy"),
    [
        ("ask(); sys.exit(3)", ["12"], "exit", 1.0),
        ("print('no key'); sys.exit(1)", [], "error", 0.0),
        ("", [], "error", 0.0),
        ("ask(model='gpt')[0] == 404 and sys.exit(1)", [], "client_model", 0.0),
        (
            "ask(messages=[{'role': 'user', 'content': [{'type': 'image_url'}]}])[0] == 400 and sys.exit(1)",
            [],
            "client_images",
            0.0,
        ),
        ("while True: ask(n=3)", [], "client_request", 0.0),
        ("while True: ask()", ["1", "2", "12"], "turns", 1.0),
        ("ask(); ask(messages=[{'role': 'user', 'content': 'word ' * 900}])", ["12"], "length", 1.0),
        ("ask()", ["12 " * 400], "length", 1.0),
        ("ask(max_tokens=2)", ["12 " * 400], "answer", 1.0),
        ("ask() and sys.exit(1)", [EngineError("away")], "aborted", 0.0),
    ],
)
async def test_every_end_has_its_stop_reason(tokenizer, tmp_path, body, texts, stop, accuracy):
    made = await play(tokenizer, texts, command=script(tmp_path, body), turns=3)
    assert (made.stop, made.accuracy) == (stop, accuracy), made.error
    assert made.aborted == (stop in ("error", "aborted") or stop.startswith("client_"))


async def test_a_command_that_never_ends_is_killed_with_all_that_it_started(tokenizer, tmp_path):
    body = """
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ask()
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
open("pid", "w").write(str(child.pid))
time.sleep(600)
"""

    async def pid_of(task, text):
        with open(os.path.join(task.extra["directory"], "pid")) as file:
            pid_of.pid = int(file.read())
        return await reward(task, text)

    harnesses.GRACE, kept = 0.2, harnesses.GRACE
    began = time.monotonic()
    try:
        made = await play(tokenizer, ["12"], command=script(tmp_path, body), seconds=6.0, reward=pid_of)
    finally:
        harnesses.GRACE = kept
    assert time.monotonic() - began < 20
    assert (made.stop, made.accuracy, made.metrics["timed_out"]) == ("time", 1.0, 1.0)  # what was sampled is graded
    state = Path(f"/proc/{pid_of.pid}/stat")  # a zombie is dead; who reaps it is another matter
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.skipif(not confine.available(), reason="this kernel has no Landlock")
async def test_a_command_writes_in_its_own_directory_only(tokenizer, tmp_path):
    body = f"""
ask()
open("mine", "w").write("x")
for forbidden in (lambda: open({str(tmp_path / "theirs")!r}, "w"), lambda: os.remove({str(tmp_path / "agent.py")!r})):
    try:
        forbidden()
    except PermissionError:
        print("refused")
try:
    os.kill(os.getppid(), 0)
except PermissionError:
    print("no signals")
try:
    open(f"/proc/{{os.getppid()}}/environ").read()
except PermissionError:
    print("no keys")
"""
    made = await play(tokenizer, ["12"], command=script(tmp_path, body))
    assert made.stop == "answer" and not (tmp_path / "theirs").exists() and (tmp_path / "agent.py").exists()
    lines = reward.seen["output"].split("\n")
    assert lines[:2] == ["refused"] * 2 and "no keys" in lines


async def test_a_grader_that_raises_or_fails_masks_the_episode(tokenizer, tmp_path):
    async def raising(task, text):
        raise RuntimeError("mistake of the grader")

    async def failing(task, text):
        return Score(0.0, 0.0, status="failed")

    made = await play(tokenizer, ["12"], command=script(tmp_path, "ask()"), reward=raising)
    assert made.stop == "error" and "mistake of the grader" in made.error and len(made.sequences) == 1
    made = await play(tokenizer, ["12"], command=script(tmp_path, "ask()"), reward=failing)
    assert made.stop == "aborted"


@pytest.mark.skipif(shutil.which("mini") is None, reason="pip install mini-swe-agent")
async def test_mini_swe_agent_repairs_a_toy_repository(tokenizer, monkeypatch):
    """An agent that exists already, as its package installs it: one sequence, nothing tokenised again."""

    def call(command):
        return f"<tool_call>\n{json.dumps({'name': 'bash', 'arguments': {'command': command}})}\n</tool_call>"

    async def tests_pass(task, text):
        with open(os.path.join(task.extra["directory"], "calc.py")) as file:
            return Score(1.0, float("a + b" in file.read()))

    variables = {"MSWEA_CONFIGURED": "true", "MSWEA_COST_TRACKING": "ignore_errors", "MSWEA_SILENT_STARTUP": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    files = {
        "calc.py": "def add(a, b):\n    return a - b\n",
        "test_calc.py": "import calc\nassert calc.add(2, 2) == 4\n",
    }
    task = Task("t", [Message("user", "The test in test_calc.py fails. Mend calc.py.")], "", extra={"files": files})
    said = [
        f"I look first. {call('cat calc.py')}",
        call("sed -i 's/a - b/a + b/' calc.py && python3 test_calc.py"),
        call("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"),
    ]
    command = "mini -t {prompt} -m openai/{model} -y --exit-immediately -o trajectory.json"
    made = await play(
        tokenizer,
        said,
        command=command,
        variables=tuple(variables),
        task=task,
        reward=tests_pass,
        seconds=120.0,
        room=4000,
    )
    assert (made.stop, made.accuracy, len(made.sequences)) == ("answer", 1.0, 1), made.error
    assert made.metrics["num_turns"] == 3 and made.metrics["retokenised"] == made.metrics["refused"] == 0


def test_words_of_a_command_are_replaced_once_and_files_become_absolute():
    words = {"{prompt}": "{model} 'x'", "{model}": "policy"}
    assert harnesses._filled("--task={prompt} {model}", words) == "--task={model} 'x' policy"
    assert harnesses.split(f"{sys.executable} setup.py '{{prompt}}'")[1:] == [os.path.abspath("setup.py"), "{prompt}"]
    with pytest.raises(ValueError, match="no such program"):
        harnesses.split("no-such-program --flag")
