"""New weights into a running SGLang server: files, shared memory and process group, against a copy of the same bytes.

    python -m launch.benchmark refit
    python -m launch.benchmark refit --params 0.19 0.6 --ways files distributed --dir /mnt/shared --fsync

Each round runs, per way: a copy of the same number of bytes (one write and one read) into a new file and over an old
one, a refit of an idle server, and a refit during a running request.

publish s   parameters to files, with --fsync until they are on the disk
transfer s  pause, transfer, load, flush, continue
proof s     the server scores the probe; the trainer computes its side meanwhile
refit s     all of it, until the server has proven the weights
cpu s       of a refit: CPU-seconds of trainer, sender and server together
checksum s  the server's /weights_checker, which hashes all weights; not part of a refit
stop s      longest gap between two tokens of the running request, and `usual s` the longest without an update
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import harness
from open_agentrl_jax.models import qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.rollout import refit, sending, servers
from open_agentrl_jax.rollout.remote import Server
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.rollout.sglang import SGLangPool
from open_agentrl_jax.train.publish import publish_weights, start_replay

SIZES = {  # by billions of parameters; the larger two are as Qwen3-0.6B and Qwen2.5-1.5B
    "tiny": ModelConfig("qwen3", 512, 64, 128, 2, 4, 2, 128, tie_word_embeddings=True),
    "0.19": ModelConfig("qwen3", 512, 1024, 3072, 12, 16, 8, 128, tie_word_embeddings=True),
    "0.6": ModelConfig("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, tie_word_embeddings=True),
    "1.5": ModelConfig("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, tie_word_embeddings=True),
}
WAYS = (refit.FILES, refit.TENSORS, refit.DISTRIBUTED)
CONTEXT = 1024
TOKENS = 128  # of the running request


class Subject:
    """One model, one running server with its pool, and a folder for versions."""

    def __init__(self, config: ModelConfig, folder: pathlib.Path, dtype: str, fsync: bool):
        """Starts the server and connects to it."""
        self.config, self.folder, self.fsync = config, folder, fsync and medium(folder) != "tmpfs"
        self.params = jax.block_until_ready(qwen.init(config, 0))
        self._change = jax.jit(lambda params: jax.tree.map(lambda x: x * 1.01, params), donate_argnums=0)
        self.version = 0
        first = publish_weights(self.params, config, folder, 0)
        self.bytes = sum(file.stat().st_size for file in first.glob("*.safetensors"))
        cpu = servers.CPU_FLAGS
        flags = [dtype if before == "--dtype" else flag for before, flag in zip(("", *cpu), cpu, strict=False)]
        flags += ["--mem-fraction-static", "0.5"]  # the usual 0.05 does not hold the larger models
        log_dir = folder / "logs"
        self.launched = servers.LaunchedServers(
            first, 1, log_dir=log_dir, context_length=CONTEXT, max_tokens=2048, flags=[flags]
        )
        self.launched.wait()
        self.loop, self._proof = EventLoop(), lambda: np.zeros(0)
        self.refit = refit.Refit(refit.DISTRIBUTED, sending.Sender(servers.interpreter(), 600))
        replay: Callable[[Any], np.ndarray] = lambda ids: self._proof()  # noqa: E731
        self.pool = SGLangPool(self.launched.urls, vocab_size=config.vocab_size, replay=replay, refit=self.refit)
        self.loop.run(self.pool.open())

    @property
    def server(self) -> Server:
        """The server."""
        return self.pool.fleet.servers[0]

    def close(self) -> None:
        """Ends the server."""
        self.loop.run(self.pool.close())
        self.loop.close()
        self.launched.close()

    def update(self, way: str) -> dict[str, float]:
        """Changes the parameters and refits the server."""
        self.params, self.refit.preferred = jax.block_until_ready(self._change(self.params)), way
        self.version += 1
        cpu, start = self._cpu_seconds(), time.perf_counter()
        path = publish_weights(self.params, self.config, self.folder, self.version)
        for file in path.glob("*.safetensors") if self.fsync else ():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        published = time.perf_counter()
        self._proof = start_replay(self.params, self.config, self.pool.probe)
        self.loop.run(self.pool.update_weights(str(path), self.version))
        done = time.perf_counter()
        if self.refit.fallbacks:
            raise RuntimeError(f"{way} fell back to files")
        inside = self.pool.metrics()
        return {
            "publish s": published - start,
            "transfer s": inside["rollout/server_load_seconds"],
            "proof s": inside["rollout/proof_seconds"],
            "refit s": done - start,
            "cpu s": self._cpu_seconds() - cpu,
        }

    def stop(self, way: str) -> dict[str, float]:
        """Longest gap between tokens of a request that runs during an update, and of one that runs undisturbed."""
        gaps = {}
        for name in ("usual s", "stop s"):
            stream = self.loop.submit(self._gap())
            if name == "stop s":
                time.sleep(0.2)
                self.update(way)
            gaps[name] = stream.result()
        return gaps

    async def _gap(self) -> float:
        params = {"max_new_tokens": TOKENS, "ignore_eos": True, "stream_interval": 1}
        body = {"input_ids": [1, 2, 3], "sampling_params": params, "return_logprob": True}
        longest, last = 0.0, 0.0
        async for piece in self.server.generate(body):
            now = time.perf_counter()
            longest = max(longest, now - last if last else 0.0)
            last = now if piece.ids else last
        return longest

    def checksum(self) -> dict[str, float]:
        """Seconds of the server's checksum of all weights."""
        return {"checksum s": harness.seconds(lambda: self.loop.run(self.server.post("weights_checker", 600)))}

    def _cpu_seconds(self) -> float:
        """Of this process, the sender and the server so far."""
        others = [*servers._members(self.launched._guards[0].pid), self.refit.sender_pid or 0]
        total = time.process_time()
        for pid in others:
            with contextlib.suppress(OSError):
                fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return total


@contextlib.contextmanager
def opened(config: ModelConfig, root: str, options: argparse.Namespace) -> Iterator[tuple[Subject, Copy]]:
    """A subject in a new folder below `root`, and the copy that it is compared with."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        subject = Subject(config, pathlib.Path(folder), options.dtype, options.fsync)
        try:
            yield subject, Copy(pathlib.Path(folder) / "copy", subject.bytes, subject.fsync)
        finally:
            subject.close()


def main(arguments: list[str]) -> None:
    """The command."""
    parser = harness.parser("refit", __doc__, rounds=5)
    parser.add_argument("--params", nargs="+", choices=SIZES, default=["0.19"], help="billions of parameters")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--dir", nargs="+", default=["/dev/shm"], help="where versions are published; once per folder")
    parser.add_argument("--dtype", default="float32", help="of the server")
    parser.add_argument("--fsync", action="store_true", help="files and copies are on the disk before they are read")
    options = parser.parse_args(arguments)
    report = harness.Report("refit", arguments)
    for root in options.dir:
        for size in options.params:
            with opened(SIZES[size], root, options) as (subject, copy):
                rows: dict[str, list[dict[str, float]]] = {way: [] for way in options.ways}
                for number in range(options.rounds + 2):
                    for way, kept in rows.items():
                        row = {"new copy s": copy.seconds(new=True), "old copy s": copy.seconds(new=False)}
                        row |= subject.update(way) | subject.checksum() | subject.stop(way)
                        if number >= 2:  # the first compiles; until then no dropped version can be overwritten
                            kept.append(row)
                facts = {"params": size, "MB": subject.bytes / 1e6, "on": medium(subject.folder)}
                for way, kept in rows.items():
                    medians = harness.medians(kept)
                    ratio = medians["refit s"] / medians["new copy s"]
                    report.add(**facts, way=way, **medians, **{"refit / copy": ratio})
    report.save(options.out)


class Copy:
    """One write and one read of a file of `count` bytes, from and to memory that exists."""

    def __init__(self, path: pathlib.Path, count: int, fsync: bool):
        """Writes nothing yet."""
        self._path, self._count, self._fsync = path, count, fsync
        self._source = memoryview(np.random.default_rng(0).bytes(min(count, 2**28)))  # more than caches hold
        self._target = memoryview(bytearray(b"x" * len(self._source)))

    def seconds(self, *, new: bool) -> float:
        """Of one copy, into a new file or over the existing one, whose pages are allocated."""
        if new:
            self._path.unlink(missing_ok=True)
        start = time.perf_counter()
        with open(os.open(self._path, os.O_WRONLY | os.O_CREAT), "wb", buffering=0) as file:
            left = self._count
            while left:
                left -= file.write(self._source[:left])
            if self._fsync:
                os.fsync(file.fileno())
        with open(self._path, "rb", buffering=0) as file:
            while file.readinto(self._target):
                pass
        return time.perf_counter() - start


def medium(folder: pathlib.Path) -> str:
    """The type of the file system that holds `folder`."""
    mounts = [line.split()[1:3] for line in pathlib.Path("/proc/mounts").read_text().splitlines()]
    return max((m for m in mounts if folder.is_relative_to(m[0])), key=lambda m: len(m[0]))[1]
