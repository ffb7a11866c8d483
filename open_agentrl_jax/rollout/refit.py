"""How new weights reach a server: from files, from shared memory, or by a broadcast in a process group.

The trainer writes every version as a Hugging Face folder (train/publish.py). `files`: the server reads that folder, on
a file system that both see. `tensors`: a server on this machine maps the tensors from shared memory. `distributed`:
one process group per server, so that a slow or dead server cannot hold the others; the folder stays in this machine's
memory. The last two need rollout/sender.py, a process with torch, and fall back to files where the server can read
them.

While weights change in place, the server reports the version "loading", which no pool accepts: whatever happens to the
transfer, no token is taken from mixed weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from open_agentrl_jax.rollout.address import is_loopback
from open_agentrl_jax.rollout.remote import Refused, Server, ServerError, Silent
from open_agentrl_jax.rollout.sending import Sender, SenderFailed
from open_agentrl_jax.types import UserError

FILES, TENSORS, DISTRIBUTED = "files", "tensors", "distributed"
LOADING = "loading"  # version string of weights that are being replaced
JOIN_SECONDS = 60.0  # for a server to join a process group
MISFIRES = 2  # consecutive failed transfers after which a server takes files only

log = logging.getLogger(__name__)
Replace = Callable[[], Awaitable[None]]


def choose(
    wanted: str, urls: Sequence[str], *, kind: str, weights_dir: str, sender: bool, room: bool = True
) -> tuple[str, str]:
    """The way for `rollout.refit`, and the reason.

    Args:
        wanted: `rollout.refit`.
        urls: of running servers; those that the run starts are on this machine.
        kind: of the servers that the run starts; running servers are recognised when they answer.
        weights_dir: `rollout.weights_dir`.
        sender: whether an environment with torch is installed.
        room: whether memory (/dev/shm) can hold the weights.

    Raises:
        UserError: the servers cannot take weights in the wanted way.
    """
    remote = [url for url in urls if not on_this_machine(url)]
    if wanted == TENSORS and remote:
        raise UserError(f"rollout.refit=tensors: {remote[0]} is on another machine; use distributed or files")
    if wanted in (TENSORS, DISTRIBUTED) and not urls and kind == "sglang_jax":
        raise UserError(f"rollout.refit={wanted}: sglang-jax servers read files only; use files or auto")
    if wanted != "auto":
        return wanted, "rollout.refit"
    if weights_dir:
        return FILES, "rollout.weights_dir names a folder that the servers read"
    if not remote:
        return FILES, "all servers are on this machine"
    if kind == "sglang_jax":
        return FILES, "sglang-jax servers read files only"
    if not sender:
        return FILES, "no environment with torch for the sender (SGLANG_ENV)"
    if not room:
        return FILES, "/dev/shm is too small for the weights"
    return DISTRIBUTED, f"{remote[0]} is on another machine and rollout.weights_dir is not set"


def on_this_machine(url: str) -> bool:
    """Whether the host of `url` is this machine."""
    return is_loopback(urllib.parse.urlsplit(url).hostname or "")


class Refit:
    """Replaces the weights of servers, each in the way that suits it."""

    def __init__(
        self, way: str = FILES, sender: Sender | None = None, *, shared: bool = True, keep_cache: bool = False
    ):
        """Starts nothing yet.

        Args:
            way: "files", "tensors" or "distributed".
            sender: for the last two.
            shared: whether servers on other machines can read the folder of a version.
            keep_cache: running requests keep the cache of their prefix, which older weights computed.
        """
        self.preferred, self._sender, self._shared = way, sender, shared
        self._keep_cache = keep_cache
        self._groups: dict[Server, tuple[str, int]] = {}  # name, and the sender's life that it belongs to
        self._misfires: dict[Server, int] = {}
        self._mapped: dict[Server, str] = {}  # version whose shared memory it may be reading
        self._forming, self._formed, self._unformed = asyncio.Lock(), False, ""
        self.fallbacks = 0  # transfers that files replaced

    @property
    def sender_pid(self) -> int | None:
        """Process id of the running sender."""
        return None if self._sender is None else self._sender.pid

    def way(self, server: Server) -> str:
        """The way that is tried first for this server."""
        if self._sender is None or not server.dialect.takes_tensors or self._misfires.get(server, 0) >= MISFIRES:
            return FILES
        local = on_this_machine(server.url)
        return FILES if self.preferred == TENSORS and not local else self.preferred

    def keeps_cache(self, server: Server) -> bool:
        """Whether an update leaves the cache of this server."""
        return self._keep_cache and server.dialect.keeps_cache

    async def prepare(self, server: Server, path: str, version: int, seconds: float) -> Replace:
        """Does what needs no pause; the returned function replaces the weights of the paused server."""
        way = self.way(server)
        files = self._files(server, path, version, seconds)
        if way == FILES:
            return files
        readable = self._shared or on_this_machine(server.url)
        try:
            replace = await {TENSORS: self._tensors, DISTRIBUTED: self._distributed}[way](
                server, path, version, seconds
            )
        except (ServerError, Refused) as error:
            await self._failed(server, way, error, readable)
            return files

        async def attempt() -> None:
            try:
                await server.post("update_weight_version", 30, new_version=LOADING, abort_all_requests=False)
                await replace()
                self._misfires.pop(server, None)
            except (ServerError, Refused) as error:
                await self._failed(server, way, error, readable)
                await files()

        return attempt

    async def close(self) -> None:
        """Ends the sender."""
        if self._sender is not None:
            await self._sender.close()

    async def _failed(self, server: Server, way: str, error: Exception, readable: bool) -> None:
        """Counts and logs a failed transfer; raises if files cannot replace it."""
        self._misfires[server] = self._misfires.get(server, 0) + 1
        await self._leave(server)
        if isinstance(error, Silent):
            raise error
        if not readable:
            rejected = isinstance(error, Refused) and self._misfires[server] >= MISFIRES
            self._misfires[server] %= MISFIRES
            raise (Refused if rejected else ServerError)(f"{way}: {error}") from None
        self.fallbacks += 1
        log.warning("%s: %s failed (%s); it loads files instead", server.url, way, error)

    def _files(self, server: Server, path: str, version: int, seconds: float) -> Replace:
        """The server reads the folder."""

        async def replace() -> None:
            answer = await server.post(
                "update_weights_from_disk",
                seconds,
                model_path=path,
                weight_version=str(version),
                flush_cache=not self.keeps_cache(server),
            )
            if isinstance(answer, dict) and answer.get("success") is False:
                raise Refused(f"update_weights_from_disk: {answer.get('message')}")

        return replace

    async def _tensors(self, server: Server, path: str, version: int, seconds: float) -> Replace:
        """The server maps the tensors in shared memory."""
        sender = self._sender
        assert sender is not None
        buckets = (await sender.call("buckets", path=path))["buckets"]
        self._mapped[server] = path
        payloads = []
        for index in range(len(buckets)):
            reuse = set(self._mapped.values()) == {path}
            payloads.append((await sender.call("share", path=path, bucket=index, reuse=reuse))["payload"])

        async def replace() -> None:
            async with _session(server):
                for index, payload in enumerate(payloads):
                    last = index == len(payloads) - 1
                    await server.post(
                        "update_weights_from_tensor",
                        seconds,
                        serialized_named_tensors=[payload] * server.ranks,
                        flush_cache=last and not self.keeps_cache(server),
                        weight_version=str(version) if last else LOADING,
                    )
            self._mapped.pop(server, None)  # after an error it may still be reading

        return replace

    async def _distributed(self, server: Server, path: str, version: int, seconds: float) -> Replace:
        """The sender broadcasts each bucket to the ranks of the server."""
        sender = self._sender
        assert sender is not None
        buckets = (await sender.call("buckets", path=path))["buckets"]
        group = await self._group(server)

        async def replace() -> None:
            async with _session(server):
                for index, bucket in enumerate(buckets):
                    last = index == len(buckets) - 1
                    receive = server.post(
                        "update_weights_from_distributed",
                        seconds,
                        names=bucket["names"],
                        dtypes=bucket["dtypes"],
                        shapes=bucket["shapes"],
                        group_name=group,
                        load_format="flattened_bucket",
                        flush_cache=last and not self.keeps_cache(server),
                        weight_version=str(version) if last else LOADING,
                    )
                    await _both(receive, sender.call("send", seconds, group=group, path=path, bucket=index))

        return replace

    async def _group(self, server: Server) -> str:
        """The process group of a server: the one of the last update, or a new one."""
        sender = self._sender
        assert sender is not None
        name, life = self._groups.get(server, ("", -1))
        if life == sender.lives and server.group == name:
            return name
        await self._leave(server)
        # A server that cannot reach the sender waits for half an hour. Only the first one takes that risk.
        async with contextlib.nullcontext() if self._formed else self._forming:
            if self._unformed:
                raise SenderFailed(self._unformed)
            try:
                name = await self._form(server, sender)
            except Silent as error:
                self._unformed = "" if self._formed else f"{server.url} did not join a group: {error}"
                raise
            self._formed = True
        self._groups[server], server.group = (name, sender.lives), name
        return name

    async def _form(self, server: Server, sender: Sender) -> str:
        host = local_address(server.url)
        store = await sender.call("listen", host=host)
        # A server refuses the name of a group that it has, and another trainer or an earlier one may have chosen it.
        name, world = f"open-agentrl-{secrets.token_hex(8)}", 1 + server.ranks
        joined = server.post(
            "init_weights_update_group",
            JOIN_SECONDS,
            master_address=host,
            master_port=store["port"],
            rank_offset=1,
            world_size=world,
            group_name=name,
            backend=store["backend"],
        )
        try:
            await _both(joined, sender.call("join", JOIN_SECONDS, port=store["port"], group=name, world=world))
        except ServerError as error:
            sender.kill()  # it would wait as long as the server, and other groups behind it
            raise Silent(f"no connection from the server to {host}:{store['port']}? ({error})") from None
        return name

    async def _leave(self, server: Server) -> None:
        """Forgets the group of a server on both sides."""
        name, life = self._groups.pop(server, ("", -1))
        if self._sender is not None and life == self._sender.lives:
            with contextlib.suppress(ServerError):
                await self._sender.call("leave", 30, group=name)
        if name and server.group == name:
            with contextlib.suppress(ServerError, Refused):
                await server.post("destroy_weights_update_group", 10, group_name=name)
        server.group = ""


def local_address(url: str) -> str:
    """The address of this machine on the way to the host of `url`."""
    parts = urllib.parse.urlsplit(url)
    found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
    with socket.socket(found[0][0], socket.SOCK_DGRAM) as one:
        one.connect(found[0][4])  # sends nothing
        return one.getsockname()[0]


@contextlib.asynccontextmanager
async def _session(server: Server):
    """SGLang changes weights in place only within a session; a broken one is closed before the next begins."""
    try:
        await server.post("begin_weight_update", 60)
    except Refused:
        await server.post("end_weight_update", 60)
        await server.post("begin_weight_update", 60)
    yield
    await server.post("end_weight_update", 60)


async def _both(receive: Awaitable[Any], send: Awaitable[Any]) -> None:
    """Waits for both sides of a transfer; where one fails, the other cannot succeed."""
    tasks = [asyncio.ensure_future(receive), asyncio.ensure_future(send)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
