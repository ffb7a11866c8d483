"""Plays an episode with somebody else's agent: a command line, or an async function, that speaks the OpenAI chat API.

A command runs in a directory of its own, with the endpoint in its environment:

    OPENAI_BASE_URL, OPENAI_API_BASE, OPENAI_API_KEY, OPENAI_MODEL      the policy, for this episode alone
    TASK_FILE                                                           {"id", "prompt", "messages"} as JSON
    HOME, TMPDIR                                                        below the directory

`{prompt}`, `{task_file}` and `{model}` in the command are replaced, after it was split into words; words that name a
file of the folder in which the run was started become absolute paths. The directory begins with the files of
`task.extra["files"]` (name -> text). When the command ends, or its time or tokens are used up, every process that it
left is killed. The grader finds in `task.extra`: "directory", "exit_status" (None if killed) and "output" (its end).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from open_agentrl_jax.agent.environment import Reward
from open_agentrl_jax.agent.episode import GRADING_SECONDS, MAX_TRACEBACK
from open_agentrl_jax.agent.transcript import Transcript
from open_agentrl_jax.sandbox import confine
from open_agentrl_jax.types import Episode, Task

GRACE = 3.0  # seconds between SIGTERM and SIGKILL
OUTPUT = 1 << 16  # bytes of output that are kept, the end of it
INHERITED = ("PATH", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH", "SSL_CERT_FILE")


@dataclasses.dataclass(frozen=True)
class Access:
    """How one episode reaches the policy."""

    url: str  # ends in /v1
    key: str
    model: str


class Endpoint(Protocol):
    """Serves transcripts; see serve.capture."""

    async def open(self, transcript: Transcript) -> Access:
        """Admits an episode."""
        ...

    def shut(self, access: Access) -> None:
        """Refuses its key from now on."""
        ...


@dataclasses.dataclass(frozen=True)
class Harness:
    """A foreign agent: `command` or `function`."""

    command: str = ""
    function: Callable[[Task, Access, Path], Awaitable[Any]] | None = None
    variables: tuple[str, ...] = ()  # of the environment, passed on to the command beside INHERITED


@dataclasses.dataclass
class _End:
    """How the agent ended: `status` is None where it was killed; `late` where its time was used up."""

    status: int | None
    output: str = ""
    late: bool = False


async def play(
    harness: Harness, endpoint: Endpoint, transcript: Transcript, task: Task, reward: Reward, *, seconds: float
) -> Episode:
    """Plays one episode to its end.

    Args:
        harness: the agent.
        endpoint: where it reaches the policy.
        transcript: a new one.
        task: the problem.
        reward: grades the last words of the agent; see the module for what it finds in `task.extra`.
        seconds: after which the agent is killed; what was sampled by then is graded.

    Returns:
        The episode. `stop` is "answer" where the agent ended by itself with status 0, "exit" with another status,
        "time", "length" and "turns" where a budget ended it, "aborted" where engine or grader failed, "error" where
        the agent failed before its first answer or the grader raised, and a client_* reason of agent.transcript where
        its requests could not be served.
    """
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="harness-"))
    access = await endpoint.open(transcript)
    try:
        prepare(directory, task)
        run = _call if harness.function else _run
        end = await run(harness, access, transcript, task, directory, seconds)
        endpoint.shut(access)
        episode = await transcript.close(_stop(end, transcript))
        if not episode.sequences and not episode.aborted:
            episode.stop = "error"
        if episode.faulted:
            episode.error = end.output[-MAX_TRACEBACK:] or f"the agent made no request and ended with {end.status}"
        else:
            await _grade(episode, transcript, reward, _seen(task, directory, end))
    except BaseException:
        await transcript.release()
        raise
    finally:
        endpoint.shut(access)
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
    episode.metrics |= {"seconds": time.monotonic() - began, "timed_out": float(end.late)}
    return episode


def prepare(directory: Path, task: Task) -> None:
    """Writes the files of a task into the working directory."""
    for name, text in task.extra.get("files", {}).items():
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            raise ValueError(f"problem {task.id}: file {name!r} lies outside the working directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    prompt = task.messages[-1].content if task.messages else ""
    shown = {"id": task.id, "prompt": prompt, "messages": [message.to_chat() for message in task.messages]}
    (directory / "task.json").write_text(json.dumps(shown), encoding="utf-8")
    (directory / ".tmp").mkdir()


def _stop(end: _End, transcript: Transcript) -> str:
    """Why an episode ended."""
    refused = transcript.last_refusal
    if transcript.failed and end.status != 0:
        return "aborted"
    if end.late:
        return "time"
    if end.status == 0:
        return refused if refused in ("length", "turns") else "length" if transcript.cut else "answer"
    return refused or ("exit" if transcript.answered else "error")


def _seen(task: Task, directory: Path, end: _End) -> Task:
    """The task as the grader sees it."""
    more = {"directory": str(directory), "exit_status": end.status, "output": end.output}
    return dataclasses.replace(task, extra=task.extra | more)


async def _grade(episode: Episode, transcript: Transcript, reward: Reward, task: Task) -> None:
    try:
        async with asyncio.timeout(GRADING_SECONDS):
            score = await reward(task, transcript.last_words)
    except TimeoutError:
        episode.stop = "aborted"
        return
    except Exception:  # a user's code raises whatever it likes
        episode.stop, episode.error = "error", traceback.format_exc()[-MAX_TRACEBACK:]
        return
    if score.status == "failed":
        episode.stop = "aborted"
        return
    episode.reward, episode.accuracy, episode.prediction = score.score, score.accuracy, score.prediction


async def _call(
    harness: Harness, access: Access, transcript: Transcript, task: Task, directory: Path, seconds: float
) -> _End:
    """Awaits an agent that is a function of this process."""
    assert harness.function is not None
    work = asyncio.ensure_future(harness.function(task, access, directory))
    try:
        late = await _until(work, transcript, seconds)
        if not work.done():
            return _End(None, late=late)
        await work
    except Exception:  # a user's code raises whatever it likes
        return _End(1, traceback.format_exc()[-MAX_TRACEBACK:])
    finally:
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await work
    return _End(0)


async def _run(
    harness: Harness, access: Access, transcript: Transcript, task: Task, directory: Path, seconds: float
) -> _End:
    """Runs an agent that is a command line."""
    words = {"{prompt}": task.messages[-1].content if task.messages else "", "{model}": access.model}
    words["{task_file}"] = str(directory / "task.json")
    command = [_filled(word, words) for word in split(harness.command)]
    process = await asyncio.create_subprocess_exec(
        *confine.wrapped(command, directory),
        cwd=directory,
        env=_environment(harness, access, directory),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    kept = bytearray()
    reading = asyncio.ensure_future(_read(process.stdout, kept))
    waiting = asyncio.ensure_future(process.wait())
    late = False
    try:
        late = await _until(waiting, transcript, seconds)
    finally:
        ended = process.returncode
        await _kill(process, access.key, hurry=ended is not None)
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(reading, 1.0)
    return _End(ended, kept.decode("utf-8", "replace"), late)


async def _until(work: asyncio.Future, transcript: Transcript, seconds: float) -> bool:
    """Waits until the agent ends, its time is used up, or all its requests are refused; True where it is late."""
    hopeless = asyncio.ensure_future(transcript.hopeless.wait())
    try:
        done, _ = await asyncio.wait([work, hopeless], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        hopeless.cancel()
    return not done


async def _read(stream: Any, kept: bytearray) -> None:
    while chunk := await stream.read(1 << 14):
        kept += chunk
        del kept[:-OUTPUT]


async def _kill(process: asyncio.subprocess.Process, key: str, *, hurry: bool) -> None:
    """Ends the command's process group and every process that has the episode's key in its environment."""
    for sign in ([] if hurry else [signal.SIGTERM]) + [signal.SIGKILL]:
        for pid in await asyncio.to_thread(_descendants, key):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, sign)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        if sign == signal.SIGTERM:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), GRACE)
    await process.wait()


def _descendants(key: str) -> list[int]:
    """Processes with the key in their environment, wherever they moved in the process tree."""
    found, mark = [], f"OPENAI_API_KEY={key}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def _environment(harness: Harness, access: Access, directory: Path) -> dict[str, str]:
    passed = {name: os.environ[name] for name in (*INHERITED, *harness.variables) if name in os.environ}
    return passed | {
        "OPENAI_BASE_URL": access.url,
        "OPENAI_API_BASE": access.url,
        "OPENAI_API_KEY": access.key,
        "OPENAI_MODEL": access.model,
        "TASK_FILE": str(directory / "task.json"),
        "HOME": str(directory),
        "TMPDIR": str(directory / ".tmp"),
        "NO_PROXY": "127.0.0.1,localhost",
    }


def _filled(word: str, words: dict[str, str]) -> str:
    """One argument with its placeholders replaced, none of them twice."""
    for name, value in words.items():
        if name in word:
            before, _, after = word.partition(name)
            return _filled(before, words) + value + _filled(after, words)
    return word


def split(command: str) -> Sequence[str]:
    """The words of a command line, files as absolute paths.

    Raises:
        ValueError: it cannot be split, or names no program.
    """
    found = [str(Path(word).absolute()) if os.path.isfile(word) else word for word in shlex.split(command)]
    if not found or shutil.which(found[0]) is None:
        raise ValueError(f"{found[0] if found else command!r}: no such program")
    return found
