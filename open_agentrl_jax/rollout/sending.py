"""The trainer's end of rollout/sender.py, and the folder in memory that both share."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import Any

from open_agentrl_jax.rollout.remote import ServerError


class MemoryFolder:
    """A folder in this machine's memory that disappears with this process, however it ends."""

    def __init__(self, parent: str = "/dev/shm"):
        """Creates the folder; a shell that waits on a pipe from this process removes it."""
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="open-agentrl-", dir=parent))
        script = 'trap "" TERM INT HUP; read -r _; rm -rf "$1"'
        self._guard = subprocess.Popen(
            ["sh", "-c", script, "memory-folder", str(self.path)], stdin=subprocess.PIPE, start_new_session=True
        )

    @staticmethod
    def has_room(size: int, parent: str = "/dev/shm") -> bool:
        """Whether three versions of `size` bytes fit into half of the free memory there."""
        try:
            return shutil.disk_usage(parent).free / 2 > 3 * size
        except OSError:
            return False

    def close(self) -> None:
        """Removes the folder."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()


class SenderFailed(ServerError):
    """The sender is dead, or could not do what was requested."""


class Sender:
    """The process of rollout/sender.py; it is started when it is first used, and again after it died."""

    def __init__(self, python: str | os.PathLike[str], seconds: float):
        """Starts nothing yet.

        Args:
            python: an interpreter that has torch.
            seconds: time limit of one transfer.
        """
        self._command = [str(python), "-I", str(pathlib.Path(__file__).with_name("sender.py")), str(seconds)]
        self._seconds = seconds
        self._process: asyncio.subprocess.Process | None = None
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers, self._starting = itertools.count(), asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None
        self.lives = 0  # number of starts: groups of an earlier process are gone

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return None if self._process is None else self._process.pid

    async def call(self, op: str, seconds: float | None = None, **fields: Any) -> dict[str, Any]:
        """Runs one operation of rollout/sender.py.

        Raises:
            SenderFailed: the operation failed, took too long (the sender is killed), or the sender died.
        """
        await self._start()
        assert self._process is not None and self._process.stdin is not None
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._process.stdin.write(json.dumps({"id": number, "op": op, **fields}).encode() + b"\n")
            async with asyncio.timeout(seconds or self._seconds):
                await self._process.stdin.drain()
                reply = await self._waiting[number]
        except TimeoutError:
            self.kill()
            raise SenderFailed(f"the sender did not finish {op!r} in time") from None
        except OSError as error:
            raise SenderFailed(f"the sender died: {error}") from None
        finally:
            self._waiting.pop(number, None)
        if "error" in reply:
            raise SenderFailed(f"the sender cannot {op}: {reply['error']}")
        return reply

    def kill(self) -> None:
        """Ends the process, which breaks its connections: no server waits for it any longer."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self) -> None:
        """Ends the process."""
        self.kill()
        if self._reader is not None:
            await self._reader

    async def _start(self) -> None:
        async with self._starting:
            if self._reader is not None and not self._reader.done():
                return
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    env=environment,
                    limit=2**24,
                )
            except OSError as error:
                raise SenderFailed(f"the sender does not start: {error}") from None
            self.lives += 1
            self._reader = asyncio.ensure_future(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            reply = json.loads(line)
            if (future := self._waiting.get(reply.pop("id"))) is not None and not future.done():
                future.set_result(reply)
        status = await process.wait()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(SenderFailed(f"the sender died with exit status {status}"))
