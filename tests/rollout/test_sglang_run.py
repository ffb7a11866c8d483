"""`launch.train` on real SGLang servers, faults by a proxy and a SIGKILL: it goes on, or stops with one line."""

import asyncio
import collections

import pytest

from open_agentrl_jax.data import synthetic
from tests.launch.runs import ROOT, command, environment, lines
from tests.rollout.pools import until
from tests.rollout.proxy import Proxy

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]
STEPS = 6
EPISODE = "stop_token_ids"  # what an episode sends, and a probe does not


async def train(run_dir, proxies, **overrides):
    servers = tuple(proxy.url for proxy in proxies)
    fields = {"rollout.servers": servers, "rollout.launch_servers": 0, "rl.steps": STEPS, "checkpoint.every": 2}
    argv = command("train", run_dir, config="configs/quickstart_sglang.py", **{**fields, **overrides})
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    return await asyncio.create_subprocess_exec(*argv, cwd=ROOT, env=environment(), **pipes)


async def test_a_run_outlives_faults_and_stops_at_wrong_weights(qwen3, checkpoints, tmp_path):
    synthetic.train_tokenizer(synthetic.corpus(0)).save_pretrained(tmp_path / "tokenizer")
    run_dir = tmp_path / "run"
    model = {"model.path": checkpoints.paths["qwen3", 0], "model.tokenizer": tmp_path / "tokenizer"}
    async with Proxy(qwen3.urls[0]) as first, Proxy(qwen3.urls[1]) as second:
        process = await train(run_dir, (first, second), **model)
        first.fault("generate", "status", times=2, text=EPISODE)
        second.fault("generate", "truncate", value=300, times=2, text=EPISODE)
        second.fault("update_weights_from_disk", "delay", value=3.0, times=1)

        def rl():
            metrics = lines(run_dir) if (run_dir / "metrics.jsonl").exists() else []
            return [line for line in metrics if line["phase"] == "rl"]

        output = asyncio.ensure_future(process.communicate())
        await until(lambda: rl() or output.done(), 200)
        qwen3.kill(0)
        _, errors = await output
        assert process.returncode == 0, errors.decode()[-3000:]
        assert [line["step"] for line in rl()] == list(range(1, STEPS + 1))
        assert rl()[-1]["rollout/retries"] >= 4
        assert rl()[-1]["rollout/servers_lost"] == 1
        played = [line for line in lines(run_dir, "trajectories.jsonl") if line["phase"] == "rl"]
        assert not [line for line in played if line["stop"] == "aborted"]
        assert all(line["versions"] == [line["step"] - 1] for line in played)
        assert set(collections.Counter((line["step"], line["problem_id"]) for line in played).values()) == {2}
        assert len(played) == STEPS * 4

        # The same run, longer; what stands at the path now is another model.
        for proxy in (first, second):
            proxy.fault("update_weights_from_disk", "path", value=checkpoints.paths["qwen3", 1])
        process = await train(run_dir, (first, second), **{**model, "rl.steps": STEPS + 2})
        _, errors = await process.communicate()
        assert process.returncode == 2, errors.decode()[-3000:]
        assert "differ from the trainer's" in errors.decode().strip().splitlines()[-1]
