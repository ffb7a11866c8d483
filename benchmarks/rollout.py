"""Rollouts from SGLang against the server's own speed: both sides in one run, medians.

    python -m launch.benchmark rollout
    python -m launch.benchmark rollout --parts overlap --model runs/quickstart_sglang/export

throughput: tokens a second of the whole path (scheduler, episodes, template, Python tool in its sandbox, grader, pool)
against a bare load generator that sends the same server the same prompts for the same number of tokens, turn after
turn, with as many episodes at once. The model is random, so what it samples is given its end here: a tool call after
every turn but the last, an answer after that; the load generator sends those tokens too. Client CPU is this process's
alone: both clients decode the same JSON.
overlap: seconds of an RL step of the quickstart on two servers, asynchronous (max_staleness 1) over synchronous.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import numpy as np

from configs import quickstart
from launch.command import Parser
from open_agentrl_jax.agent import episode
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.environment import Tool, ToolEnvironment
from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.data import synthetic
from open_agentrl_jax.rewards.graders import grade
from open_agentrl_jax.rollout.scheduler import EventLoop, Scheduler
from open_agentrl_jax.rollout.servers import LaunchedServers
from open_agentrl_jax.rollout.sglang import SGLangPool
from open_agentrl_jax.run.policy import Policy, load_policy, open_folder
from open_agentrl_jax.sandbox.client import SandboxSpec, open_sandbox
from open_agentrl_jax.types import Completion, Sampling, Task, Trajectory

CALL = """<tool_call>
{"name": "code_interpreter", "arguments": {"code": "print(sum(range(100)))"}}
</tool_call><|im_end|>"""
ANSWER = "\\boxed{4950}<|im_end|>"


@dataclasses.dataclass
class Ended:
    """The pool, with scripted ends of turns; writes down what was asked of the server."""

    pool: SGLangPool
    chat: Chat
    tokens: int
    turns: int
    # session -> (ids that are new, tokens sampled after them), one a turn
    asked: dict[str, list[tuple[list[int], int]]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )
    lengths: dict[str, int] = dataclasses.field(default_factory=dict)

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, session: str = "") -> Completion:
        """See `Engine.generate`."""
        turn, known = len(self.asked[session]), self.lengths.get(session, 0)
        wanted = int(np.random.default_rng((sampling.seed, turn)).integers(self.tokens // 2, self.tokens * 3 // 2))
        one = await self.pool.generate(
            ids, dataclasses.replace(sampling, max_tokens=wanted, stop_ids=()), session=session
        )
        self.asked[session].append((list(ids[known:]), len(one.ids)))
        self.lengths[session] = len(ids) + len(one.ids)
        end = np.array(self.chat.encode(CALL if turn + 1 < self.turns else ANSWER), np.int32)
        return Completion(
            np.concatenate([one.ids, end]),
            np.concatenate([one.logprobs, np.zeros(len(end), np.float32)]),
            "stop",
            np.concatenate([one.version, np.repeat(one.version[-1:], len(end))]),
        )

    async def update_weights(self, path: str, version: int) -> None:
        """See `Engine.update_weights`."""
        await self.pool.update_weights(path, version)

    async def release(self, session: str) -> None:
        """See `Engine.release`."""
        await self.pool.release(session)


def whole_path(options: argparse.Namespace, urls: Sequence[str], policy: Policy) -> tuple[dict, dict]:
    """One batch by the scheduler: figures, and what was asked of the servers."""
    loop, chat = EventLoop(), Chat(policy.tokenizer, [PythonTool.schema])
    sandbox = open_sandbox(SandboxSpec())
    pool = SGLangPool(urls, vocab_size=policy.config.vocab_size)
    engine = Ended(pool, chat, options.tokens, options.turns)
    budget = episode.Budget(options.turns, 10**6, 600.0)

    async def play(task: Task, *, position: int, sample: int, attempt: int) -> Trajectory:
        async def reward(task: Task, text: str) -> Any:
            return await grade(task, text, sandbox=sandbox)

        session = f"{position}-{sample}-{attempt}"
        tool: Tool = PythonTool(sandbox)
        environment = ToolEnvironment([tool], reward, session=session)
        sampling = Sampling(0, seed=position * options.samples + sample)
        return await episode.run(engine, environment, chat, task, sampling, budget, session=session)

    prompts = -(-options.episodes // options.samples)
    loop.run(pool.open())
    loop.run(sandbox.run("1"))  # its processes are started
    began, cpu = time.perf_counter(), time.process_time()
    scheduler = Scheduler(
        loop,
        play,
        synthetic.problems(0, prompts, evaluation=False),
        prompts=prompts,
        samples=options.samples,
        concurrency=options.concurrency,
        batches=1,
    )
    groups = scheduler.next_batch()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    scheduler.close()
    loop.run(pool.close())
    loop.run(sandbox.close())
    loop.close()
    lost = sum(trajectory.aborted for group in groups for trajectory in group.trajectories)
    if lost:
        raise RuntimeError(f"{lost} episodes were aborted")
    return figures(engine.asked, seconds, cpu), engine.asked


async def bare(asked: dict[str, list[tuple[list[int], int]]], urls: Sequence[str], concurrency: int) -> dict:
    """The same requests with nothing around them."""
    limit = asyncio.Semaphore(concurrency)
    began, cpu = time.perf_counter(), time.process_time()

    async def one(http: aiohttp.ClientSession, url: str, turns: list[tuple[list[int], int]]) -> None:
        ids: list[int] = []
        async with limit:
            for new, count in turns:
                ids += new
                params = {"max_new_tokens": count, "ignore_eos": True}
                body = {"input_ids": ids, "sampling_params": params, "return_logprob": True}
                async with http.post(f"{url}/generate", json=body) as response:
                    sampled = (await response.json())["output_ids"]
                if len(sampled) != count:
                    raise RuntimeError(f"asked for {count} tokens, {len(sampled)} came")
                ids += sampled

    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as http:
        await asyncio.gather(*(one(http, urls[n % len(urls)], turns) for n, turns in enumerate(asked.values())))
    return figures(asked, time.perf_counter() - began, time.process_time() - cpu)


def figures(asked: dict[str, list[tuple[list[int], int]]], seconds: float, cpu: float) -> dict[str, float]:
    """Of one measurement."""
    counts = [count for turns in asked.values() for _, count in turns]
    return {
        "seconds": seconds,
        "tokens/s": sum(counts) / seconds,
        "turns": len(counts),
        "tokens": sum(counts),
        "client CPU s per 1000 turns": 1e3 * cpu / len(counts),
    }


def throughput(options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """The whole path and the bare generator in turn, from an empty cache each time."""
    config = quickstart.get_config()
    policy = load_policy(config, open_folder(config, folder))
    rows: dict[str, list[dict]] = {"whole path": [], "bare": []}
    with LaunchedServers(
        folder / "init", options.servers, log_dir=folder, context_length=4096, max_tokens=options.concurrency * 2048
    ) as servers:
        servers.wait()
        for turn in range(options.repeats + 1):
            flush(servers.urls)
            whole, asked = whole_path(options, servers.urls, policy)
            flush(servers.urls)
            plain = asyncio.run(bare(asked, servers.urls, options.concurrency))
            if turn:  # the first warms up
                for name, row in (("whole path", whole), ("bare", plain)):
                    rows[name].append(row)
                    show(name, row)
    medians = {
        name: {key: statistics.median(row[key] for row in some) for key in some[0]} for name, some in rows.items()
    }
    ratios = [a["tokens/s"] / b["tokens/s"] for a, b in zip(rows["whole path"], rows["bare"], strict=True)]
    return {
        **medians,
        "ratio of medians": medians["whole path"]["tokens/s"] / medians["bare"]["tokens/s"],
        "ratios": ratios,
    }


def flush(urls: Sequence[str]) -> None:
    """Empties the servers' caches."""
    for url in urls:
        urllib.request.urlopen(urllib.request.Request(f"{url}/flush_cache", b""), timeout=60).close()


def overlap(options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Seconds a step of two short runs that differ in max_staleness alone; their first two steps are left out."""
    medians = {}
    for staleness in (0, 1):
        directory = folder / f"staleness-{staleness}"
        command = [sys.executable, "-m", "launch.train", "--config=configs/quickstart_sglang.py"]
        command += [f"--config.model.path={options.model}", "--config.sft.steps=0", "--config.data.sft="]
        command += ["--config.data.eval=", f"--config.rl.steps={options.steps}", f"--config.run_dir={directory}"]
        subprocess.run([*command, f"--config.rl.max_staleness={staleness}"], check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        steps = [line["time/step"] for line in lines if line["phase"] == "rl"][2:]
        medians[f"max_staleness {staleness}, s a step"] = statistics.median(steps)
    before, after = medians.values()
    return {**medians, "asynchronous / synchronous": after / before}


def show(name: str, row: dict[str, Any]) -> None:
    """One line of the table."""
    print(f"{name:12}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)


PARTS: dict[str, Callable[[argparse.Namespace, pathlib.Path], dict[str, Any]]] = {
    "throughput": throughput,
    "overlap": overlap,
}


def main(arguments: list[str]) -> None:
    """The command."""
    parser = Parser(prog="launch.benchmark rollout", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["throughput"])
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=128)
    parser.add_argument("--samples", type=int, default=8, help="episodes a problem")
    parser.add_argument("--concurrency", type=int, default=64, help="episodes at once")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="mean length of a turn")
    parser.add_argument("--steps", type=int, default=8, help="overlap: RL steps of each run")
    parser.add_argument("--model", default="", help="overlap: a folder that the quickstart exported")
    parser.add_argument("--dir", default="/dev/shm", help="where weights are written")
    parser.add_argument("--out", default="", help="file for the medians, as JSON")
    options = parser.parse_args(arguments)
    if "overlap" in options.parts and not options.model:
        parser.error("--parts overlap needs --model, a folder that the quickstart exported")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    result = {}
    for part in options.parts:
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            result[part] = PARTS[part](options, pathlib.Path(folder))
    text = json.dumps({"command": ["rollout", *arguments], "cores": len(os.sched_getaffinity(0)), **result}, indent=1)
    print(text)
    if options.out:
        pathlib.Path(options.out).write_text(text + "\n")
