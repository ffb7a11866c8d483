"""The generator that `rollout.engine` selects: the embedded engine, or a pool of SGLang servers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from open_agentrl_jax.config import Config
from open_agentrl_jax.models import lora
from open_agentrl_jax.parallel import processes
from open_agentrl_jax.rollout import servers
from open_agentrl_jax.rollout.address import api_key
from open_agentrl_jax.rollout.engine import Engine, EngineError
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.run.policy import Policy
from open_agentrl_jax.types import UserError

if TYPE_CHECKING:
    from open_agentrl_jax.rollout.refit import Refit
    from open_agentrl_jax.rollout.sending import MemoryFolder
    from open_agentrl_jax.rollout.sglang import SGLangPool

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Generation:
    """An engine for training, one for evaluation (possibly the same), and the way new weights get there."""

    engine: Engine
    evaluation: Engine
    publish: Callable[[Any, int], None]  # (params, version); returns when the engine samples from them
    concurrency: int  # episodes in parallel
    metrics: Callable[[], dict[str, float]]
    close: Callable[[], None]


def open_generation(config: Config, policy: Policy, loop: EventLoop, directory: Path) -> Generation:
    """Opens the engine of the config; publishes nothing yet."""
    return ENGINES[config.rollout.engine](config, policy, loop, directory)


def check_generation(config: Config) -> None:
    """Finds out in seconds, before anything is trained, whether rollouts can start.

    Raises:
        UserError: a server is not installed, no server can be reached, or the API key is missing.
    """
    rollout = config.rollout
    if rollout.engine != "sglang":
        return
    _pool_class()
    if rollout.launch_servers:
        servers.interpreter(rollout.server_kind)
    key = api_key(rollout.api_key_env)
    if urls := own_servers(config)[0]:

        async def reach() -> None:
            pool = _pool_class()(urls, vocab_size=1, startup_seconds=rollout.startup_seconds, api_key=key)
            try:
                await pool.open()
            finally:
                await pool.close()

        _reported(lambda: asyncio.run(reach()))


def _reported(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except EngineError as error:
        raise UserError(f"rollout.servers: {error}") from error


def _local(config: Config, policy: Policy, loop: EventLoop, directory: Path) -> Generation:
    from open_agentrl_jax.rollout.local import LocalEngine

    # With several processes each has an engine with the whole weights on one of its own devices.
    mesh = policy.mesh if jax.process_count() == 1 else None
    model, weights = policy.config, config.rollout.weights
    if weights == "merged":
        model, weights = lora.without(model), "same"

    def sampled(params: Any) -> Any:
        """The engine's parameters: with adapters beside the shared base, or a merged copy."""
        params = policy.whole(params)
        return processes.whole(lora.merge(params, policy.config) if model.lora is None else params)

    params = sampled(policy.params)
    engine = LocalEngine(
        params,
        model,
        slots=config.rollout.slots,
        max_length=config.agent.max_prompt + config.agent.max_response,
        decode_chunk=config.rollout.decode_chunk,
        mesh=mesh,
        weights=weights,
    )
    engine.warmup()

    def publish(params: Any, version: int) -> None:
        # The next update donates the state's buffers, and an asynchronous engine still samples from them then.
        engine.set_params(sampled(jax.tree.map(jnp.copy, params) if config.rl.max_staleness else params), version)

    return Generation(
        engine=engine,
        evaluation=engine,
        publish=publish,
        concurrency=config.rollout.concurrency or config.rollout.slots,
        metrics=lambda: {f"engine/{name}": float(value) for name, value in engine.stats().items()},
        close=engine.close,
    )


def launch_servers(
    config: Config, model_path: str | Path, log_dir: Path, urls: tuple[str, ...]
) -> tuple[servers.LaunchedServers | None, tuple[str, ...]]:
    """Starts the servers of `rollout.launch_servers` and returns them, and their addresses after `urls`.

    Raises:
        UserError: a server is not installed or does not start.
    """
    rollout = config.rollout
    count = rollout.launch_servers
    if not count:
        return None, urls
    context = config.agent.max_prompt + config.agent.max_response
    flags = _device_flags(config) if servers.has_accelerators(rollout.server_kind) else ()
    launched = servers.LaunchedServers(
        model_path,
        count,
        log_dir=log_dir,
        context_length=context + servers.KINDS[rollout.server_kind].spare_tokens,
        max_tokens=rollout.slots * context,
        kind=rollout.server_kind,
        flags=flags,
    )
    try:
        _reported(launched.wait)
    except BaseException:
        launched.close()
        raise
    return launched, urls + tuple(launched.urls)


def own_servers(config: Config, *, one_loads: bool = False) -> tuple[tuple[str, ...], bool]:
    """The servers of `rollout.servers` that this process uses, and whether it loads their weights.

    Processes divide the servers. With more processes than servers several use one, and the first of them loads.

    Args:
        config: with the addresses of all servers.
        one_loads: the first process loads all servers, because only it has the weights; then all processes use all.
    """
    urls, index, count = tuple(config.rollout.servers), jax.process_index(), jax.process_count()
    if one_loads:
        return urls, index == 0
    if not urls or config.rollout.launch_servers:
        return urls[index::count], True
    return urls[index % len(urls) :: min(count, len(urls))], index < len(urls)


def _device_flags(config: Config) -> list[tuple[str, ...]]:
    rollout = config.rollout
    return [
        servers.device_flags(
            rollout.server_kind,
            index,
            first_device=rollout.server_first_device,
            tensor=rollout.server_tensor,
            memory=rollout.server_memory,
        )
        for index in range(rollout.launch_servers)
    ]


def _pool_class() -> type[SGLangPool]:
    """SGLangPool, whose client library is the extra [servers].

    Raises:
        UserError: the extra is not installed.
    """
    try:
        from open_agentrl_jax.rollout.sglang import SGLangPool
    except ModuleNotFoundError as error:
        raise UserError(
            f"rollout.engine=sglang: {error.name} is missing; pip install 'open_agentrl_jax[servers]'"
        ) from None
    return SGLangPool


def open_pool(config: Config, urls: Sequence[str], loop: EventLoop, *, vocab_size: int, **settings: Any) -> SGLangPool:
    """Opens a pool over `urls` with the limits of the config.

    Raises:
        UserError: no server can be reached.
    """
    rollout = config.rollout
    pool = _pool_class()(
        urls,
        vocab_size=vocab_size,
        context_length=config.agent.max_prompt + config.agent.max_response,
        deadline=rollout.deadline,
        startup_seconds=rollout.startup_seconds,
        api_key=api_key(rollout.api_key_env),
        **settings,
    )
    try:
        _reported(lambda: loop.run(pool.open()))
    except BaseException:
        loop.run(pool.close())
        raise
    return pool


def _refit(config: Config, policy: Policy, directory: Path) -> tuple[Refit, Path, MemoryFolder | None]:
    """How weights travel, and the folder where they are published; also as a MemoryFolder if it is in memory.

    Raises:
        UserError: `rollout.refit` needs a sender, and no environment with torch is installed.
    """
    from open_agentrl_jax.rollout import refit, sending

    rollout = config.rollout
    try:
        python = servers.interpreter("sglang")
    except UserError:
        if rollout.refit in ("tensors", "distributed"):
            raise
        python = None
    size = 2 * sum(leaf.size for leaf in jax.tree.leaves(policy.params))
    room = sending.MemoryFolder.has_room(size)
    way, reason = refit.choose(
        rollout.refit,
        rollout.servers,
        kind=rollout.server_kind,
        weights_dir=rollout.weights_dir,
        sender=python is not None,
        room=room,
    )
    sender = None if way == refit.FILES or python is None else sending.Sender(python, seconds=600)
    # A server that somebody else started may see another /dev/shm than this process.
    in_memory = room and not rollout.weights_dir and (sender is not None or not rollout.servers)
    if rollout.launch_servers and jax.process_count() > 1:
        in_memory = False  # the servers on other machines read the folder, too
    folder = sending.MemoryFolder() if in_memory else None
    root = folder.path if folder else Path(rollout.weights_dir or directory / "weights")
    log.warning("rollout.refit: %s (%s); versions are published in %s", way, reason, root)
    return refit.Refit(way, sender, shared=not in_memory, keep_cache=rollout.keep_cache), root, folder


def _sglang(config: Config, policy: Policy, loop: EventLoop, directory: Path) -> Generation:
    from open_agentrl_jax.rollout.refit import Refit
    from open_agentrl_jax.train.publish import publish_weights, start_replay

    rollout = config.rollout
    follower = Refit(keep_cache=rollout.keep_cache)
    refit, root, memory = processes.in_all(
        lambda: _refit(config, policy, directory) if processes.first() else (follower, directory, None)
    )
    shared = processes.share(memory is None)
    root = Path(processes.share(str(root)))
    proof: dict[str, Callable[[], np.ndarray]] = {}  # log-probs of the probe under the published weights

    model = lora.without(policy.config)  # servers get adapters merged

    def write(merged: Any, version: int) -> str:
        source = policy.tokenizer_path
        return str(publish_weights(merged, model, root, version, tokenizer_from=source, shared=shared))

    with contextlib.ExitStack() as opened:
        if memory is not None:
            opened.callback(memory.close)
        weights = write(lora.merge(policy.whole(), policy.config), 0) if rollout.launch_servers else ""
        own, loads = own_servers(config, one_loads=not shared)

        def open_servers() -> SGLangPool:
            logs = directory / "servers" / ("" if jax.process_count() == 1 else str(jax.process_index()))
            launched, urls = launch_servers(config, weights, logs, own)
            if launched is not None:
                opened.callback(launched.close)
            settings: dict[str, Any] = {"vocab_size": policy.config.vocab_size, "refit": refit, "loads": loads}
            pool = open_pool(config, urls, loop, replay=lambda ids: proof["logprobs"](), **settings)
            opened.callback(lambda: loop.run(pool.close()))
            return pool

        pool = processes.in_all(open_servers)
        close = opened.pop_all().close

    def publish(params: Any, version: int) -> None:
        merged = lora.merge(policy.whole(params), policy.config)
        path = write(merged, version)
        proof["logprobs"] = start_replay(merged, model, pool.probe)  # on all processes, while servers load

        def load() -> None:
            try:
                loop.run(pool.update_weights(path, version))
            except EngineError as error:  # no episode can be played without weights; the run can be continued later
                raise UserError(f"rollout.servers: none has the weights of step {version}: {error}") from error

        processes.in_all(load)

    return Generation(
        engine=pool,
        evaluation=pool.for_evaluation(),
        publish=publish,
        concurrency=rollout.concurrency
        or max(1, 256 * len(rollout.servers) // jax.process_count() + 256 * rollout.launch_servers),
        metrics=pool.metrics,
        close=close,
    )


ENGINES = {"local": _local, "sglang": _sglang}
