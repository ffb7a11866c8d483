"""The part `refit` of `launch.benchmark rollout`: from parameters to servers that have proven them, against copies."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from open_agentrl_jax.models import qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.rollout.servers import CPU_FLAGS, LaunchedServers
from open_agentrl_jax.rollout.sglang import SGLangPool
from open_agentrl_jax.train.publish import publish_weights, start_replay

REFIT = {  # by billions of parameters; the larger two are as Qwen3-0.6B and Qwen2.5-1.5B
    "0.19": ModelConfig("qwen3", 512, 1024, 3072, 12, 16, 8, 128, tie_word_embeddings=True),
    "0.6": ModelConfig("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, tie_word_embeddings=True),
    "1.5": ModelConfig("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, tie_word_embeddings=True),
}


def refit(options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """New weights against copies of as many bytes in the same folder, in turn; what each part takes is shown apart."""
    result: dict[str, Any] = {"server dtype": options.dtype}
    for root in options.dir:
        for size in options.params:
            with tempfile.TemporaryDirectory(dir=root) as place:
                key = f"{size} B on {medium(pathlib.Path(place))}"
                result[key] = _refit(options, pathlib.Path(place), REFIT[size])
                print(key, json.dumps(result[key]), flush=True)
    return result


def _refit(options: argparse.Namespace, folder: pathlib.Path, config: ModelConfig) -> dict[str, Any]:
    params = jax.block_until_ready(qwen.init(config, 0))
    change = jax.jit(lambda params: jax.tree.map(lambda x: x * 1.01, params), donate_argnums=0)
    rows: list[dict[str, float]] = []
    loop = EventLoop()
    first = publish_weights(params, config, folder / "weights", 0)
    flags = [*CPU_FLAGS[: CPU_FLAGS.index("--dtype") + 1], options.dtype, *CPU_FLAGS[CPU_FLAGS.index("--dtype") + 2 :]]
    flags += ["--mem-fraction-static", "0.5"]  # the quickstart's 0.05 does not hold the larger models
    count = sum(file.stat().st_size for file in first.glob("*.safetensors"))
    sync = options.fsync and medium(folder) != "tmpfs"
    copy = Copy(folder / "copy", count, sync)
    with LaunchedServers(
        first, options.servers, log_dir=folder, context_length=1024, max_tokens=2048, flags=[flags] * options.servers
    ) as servers:
        servers.wait()
        proof: list[Callable[[], np.ndarray]] = []
        pool = SGLangPool(servers.urls, vocab_size=config.vocab_size, replay=lambda ids: proof[-1]())
        loop.run(pool.open())
        for version in range(1, options.repeats + 3):
            new, old = copy.seconds(new=True), copy.seconds(new=False)
            params = jax.block_until_ready(change(params))
            start = time.perf_counter()
            path = publish_weights(params, config, folder / "weights", version)
            if sync:
                for file in path.glob("*.safetensors"):
                    with open(file, "rb") as written:
                        os.fsync(written.fileno())
            published = time.perf_counter()
            proof.append(start_replay(params, config, pool.probe))
            loop.run(pool.update_weights(str(path), version))
            done = time.perf_counter()
            inside = pool.metrics()
            row = {
                "files s": published - start,
                "server's load s": inside["rollout/server_load_seconds"],
                "proof s": inside["rollout/proof_seconds"],
                "refit s": done - start,
                "copy into a new file s": new,
                "copy over an old file s": old,
                "probe difference": inside["rollout/probe_difference"],
            }
            if version > 2:  # the first compiles, and until the third no dropped version can be written over
                rows.append(row)
                show(f"{count / 1e6:.0f} MB", row)
        loop.run(pool.close())
    loop.close()
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    medians: dict[str, Any] = {key: statistics.median(values) for key, values in columns.items()}
    spread = {key: [min(values), max(values)] for key, values in columns.items() if key.endswith(" s")}
    ratios = {f"refit / {key[:-2]}": medians["refit s"] / medians[key] for key in medians if key.startswith("copy")}
    return {"MB": count / 1e6, "synced": sync, **medians, **ratios, "least and most": spread}


class Copy:
    """One write and one read of a file of `count` bytes, its memory touched before."""

    def __init__(self, path: pathlib.Path, count: int, fsync: bool):
        """Nothing is written yet."""
        self._path, self._count, self._fsync = path, count, fsync
        self._source = memoryview(np.random.default_rng(0).bytes(min(count, 2**28)))  # more than caches hold
        self._target = memoryview(bytearray(b"x" * len(self._source)))

    def seconds(self, *, new: bool) -> float:
        """Of one, into a file that was not there or over the bytes of the last (which has its pages)."""
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
    """The file system that holds `folder`, as the kernel calls it."""
    mounts = [line.split()[1:3] for line in pathlib.Path("/proc/mounts").read_text().splitlines()]
    return max((m for m in mounts if folder.is_relative_to(m[0])), key=lambda m: len(m[0]))[1]


def show(name: str, row: dict[str, Any]) -> None:
    """One line of the table."""
    print(f"{name:12}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
