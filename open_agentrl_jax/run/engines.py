"""What generates, chosen by `rollout.engine`: the embedded engine, or a pool of SGLang servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from open_agentrl_jax.config import Config
from open_agentrl_jax.parallel import processes
from open_agentrl_jax.rollout.engine import Engine, EngineError
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.run.policy import Policy
from open_agentrl_jax.types import UserError


@dataclasses.dataclass
class Generation:
    """An engine for training and one for evaluation (they may be the same), and how new weights get there."""

    engine: Engine
    evaluation: Engine
    publish: Callable[[Any, int], None]  # (params, version); returns when the engine samples from them
    concurrency: int  # episodes at once
    metrics: Callable[[], dict[str, float]]
    close: Callable[[], None]


def open_generation(config: Config, policy: Policy, loop: EventLoop, directory: Path) -> Generation:
    """Opens the engine of the config; nothing is published yet."""
    return ENGINES[config.rollout.engine](config, policy, loop, directory)


def _local(config: Config, policy: Policy, loop: EventLoop, directory: Path) -> Generation:
    from open_agentrl_jax.rollout.local import LocalEngine

    # Devices of other processes cannot generate for this one alone: there it takes the whole weights, on one device.
    mesh = policy.mesh if jax.process_count() == 1 else None
    params = processes.whole(policy.params)
    if not processes.first():
        return _followed(lambda params, version: processes.whole(params))
    engine = LocalEngine(
        params,
        policy.config,
        slots=config.rollout.slots,
        max_length=config.agent.max_prompt + config.agent.max_response,
        decode_chunk=config.rollout.decode_chunk,
        mesh=mesh,
        weights=config.rollout.weights,
    )
    engine.warmup()

    def publish(params: Any, version: int) -> None:
        params = processes.whole(params)
        # The next update gives the state's buffers away; an asynchronous engine still samples from them then.
        engine.set_params(jax.tree.map(jnp.copy, params) if config.rl.max_staleness else params, version)

    return Generation(
        engine=engine,
        evaluation=engine,
        publish=publish,
        concurrency=config.rollout.concurrency or config.rollout.slots,
        metrics=lambda: {f"engine/{name}": float(value) for name, value in engine.stats().items()},
        close=engine.close,
    )


def _followed(publish: Callable[[Any, int], Any]) -> Generation:
    """What a process has that plays no episodes: its part in publishing."""
    nothing: Any = None
    return Generation(nothing, nothing, publish, 0, dict, lambda: None)


def _sglang(config: Config, policy: Policy, loop: EventLoop, directory: Path) -> Generation:
    from open_agentrl_jax.rollout.servers import LaunchedServers
    from open_agentrl_jax.rollout.sglang import SGLangPool
    from open_agentrl_jax.train.publish import publish_weights, start_replay

    rollout = config.rollout
    context = config.agent.max_prompt + config.agent.max_response
    root = Path(rollout.weights_dir or directory / "weights")
    proof: dict[str, Callable[[], np.ndarray]] = {}  # log-probs of the probe under the published weights

    def write(params: Any, version: int, probe: Sequence[int]) -> str:
        path = publish_weights(params, policy.config, root, version, tokenizer_from=policy.tokenizer_path)
        proof["logprobs"] = start_replay(params, policy.config, probe)  # by all processes; goes on while servers load
        return str(path)

    weights = None
    if rollout.launch_servers:
        weights = publish_weights(policy.params, policy.config, root, 0, tokenizer_from=policy.tokenizer_path)
    if not processes.first():
        probe = processes.share([0])
        return _followed(lambda params, version: write(params, version, probe))
    launched = None
    urls = tuple(rollout.servers)
    if weights is not None:
        launched = LaunchedServers(
            weights,
            rollout.launch_servers,
            log_dir=directory / "servers",
            context_length=context,
            max_tokens=rollout.slots * context,
        )
        launched.wait()
        urls += tuple(launched.urls)
    pool = SGLangPool(
        urls,
        vocab_size=policy.config.vocab_size,
        context_length=context,
        replay=lambda ids: proof["logprobs"](),
        deadline=rollout.deadline,
    )
    loop.run(pool.open())
    processes.share(pool.probe)

    def publish(params: Any, version: int) -> None:
        path = write(params, version, pool.probe)
        try:
            loop.run(pool.update_weights(path, version))
        except EngineError as error:  # without weights no episode can be played: the run ends, and can be continued
            raise UserError(f"rollout.servers: none has the weights of step {version}: {error}") from error

    def close() -> None:
        loop.run(pool.close())
        if launched is not None:
            launched.close()

    return Generation(
        engine=pool,
        evaluation=pool.for_evaluation(),
        publish=publish,
        concurrency=rollout.concurrency or 256 * len(urls),
        metrics=pool.metrics,
        close=close,
    )


ENGINES = {"local": _local, "sglang": _sglang}
