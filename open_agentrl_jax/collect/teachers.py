"""Who plays episodes outside of training: our model, SGLang servers with a model of their own, or a chat endpoint."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from open_agentrl_jax.agent import episode
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.collect.endpoint import ChatEndpoint, MessagePolicy, Reply
from open_agentrl_jax.collect.journal import Journal, Play, RememberingEngine, digest, key_of, remembered
from open_agentrl_jax.config import Config, to_dict
from open_agentrl_jax.models import hf
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.run.engines import launch_servers, open_generation, open_pool
from open_agentrl_jax.run.players import Player, seed_of
from open_agentrl_jax.run.policy import load_policy, make_chat, open_folder
from open_agentrl_jax.run.world import World
from open_agentrl_jax.types import Sampling, Task, ToolCall, Trajectory, UserError


@dataclasses.dataclass
class PlayerSpec:
    """What is to be opened, and where it notes what it was given."""

    config: Config
    directory: Path  # scratch of engines
    loop: EventLoop
    world: World
    journal: Journal
    sampling: Sampling
    phase: str
    model: str = ""  # a folder or Hub id; of an endpoint the name it knows the model by
    url: str = ""  # of the endpoint


@dataclasses.dataclass
class Teacher:
    """Somebody who plays. `prompt` tells the tokens of a prompt, as far as it is known."""

    play: Play
    chat: Any  # a Chat, or what stands in for one
    concurrency: int
    counts: Callable[[], dict[str, int]]
    close: Callable[[], None]


def settings(config: Config, model: str, sampling: Sampling, phase: str, *, url: str = "", tools: bool = True) -> Any:
    """All that decides what an episode says, for the name of its journal."""
    tree = to_dict(config)
    kept = {name: tree[name] for name in ("seed", "behaviour", "agent", "reward")}
    kept["sandbox"] = {name: tree["sandbox"][name] for name in ("timeout", "memory_mb")}
    weights = [] if url else sorted(identity(model))
    return {
        **kept, "model": model, "weights": weights, "endpoint": url, "phase": phase, "tools": tools,
        "sampling": dataclasses.asdict(sampling),
    }  # fmt: skip


def identity(model: str) -> list[tuple[str, int, int]]:
    """Name, size and time of each weight file of a folder; a Hub id is taken by its name."""
    files = Path(model).glob("*.safetensors") if Path(model).is_dir() else ()
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def policy(wish: PlayerSpec) -> Teacher:
    """Our model on the engine of the config; its finished episodes are remembered."""
    config = wish.config
    config.model.path = wish.model
    loaded = load_policy(config, open_folder(config, wish.directory))
    chat = make_chat(config, loaded.tokenizer, wish.world.schemas)
    generation = open_generation(config, loaded, wish.loop, wish.directory)
    try:
        generation.publish(loaded.params, 0)
    except BaseException:
        generation.close()
        raise
    engine = (
        RememberingEngine(generation.evaluation, wish.journal) if wish.phase == "collect" else generation.evaluation
    )
    play = Player(config, engine, chat, wish.world, wish.sampling, wish.phase)
    calls = (lambda: {"calls": engine.calls}) if isinstance(engine, RememberingEngine) else dict
    return Teacher(remembered(play, wish.journal), chat, generation.concurrency, calls, generation.close)


def servers(wish: PlayerSpec) -> Teacher:
    """SGLang servers as they are: they keep the weights they were started with, of which nothing is loaded here."""
    from transformers import AutoConfig, AutoTokenizer

    config, rollout = wish.config, wish.config.rollout
    try:
        tokenizer, shape = (of.from_pretrained(wish.model) for of in (AutoTokenizer, AutoConfig))
    except Exception as error:
        raise UserError(f"--teacher={wish.model}: {' '.join(str(error).split())[:300]}") from error
    chat = Chat(tokenizer, wish.world.schemas)
    launched, urls = launch_servers(config, hf.resolve(wish.model), wish.directory / "servers")
    pool = open_pool(config, urls, wish.loop, vocab_size=shape.vocab_size)

    def close() -> None:
        wish.loop.run(pool.close())
        if launched is not None:
            launched.close()

    engine = RememberingEngine(pool.for_evaluation(), wish.journal)
    play = Player(config, engine, chat, wish.world, wish.sampling, wish.phase)
    concurrency = rollout.concurrency or 256 * len(urls)
    return Teacher(remembered(play, wish.journal), chat, concurrency, lambda: {"calls": engine.calls}, close)


class Uncounted:
    """In place of a Chat where the tokenizer is not ours: an endpoint counts the tokens of its prompts itself."""

    def __init__(self, tools: Sequence[Any]):
        self.tools = list(tools)

    def prompt(self, messages: Sequence[Any]) -> list[int]:
        """No tokens that we know of."""
        return []


CHARACTERS = 4  # of a token, about: a tool's output is cut to its budget by characters where there is no tokenizer


def _shorten(text: str, characters: int) -> str:
    half = characters // 2
    if len(text) <= characters:
        return text
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters cut from the middle ...]\n{text[-half:]}"


def endpoint(wish: PlayerSpec) -> Teacher:
    """An OpenAI-compatible endpoint; each of its replies is remembered, so also those of an unfinished episode."""
    config = wish.config
    if not wish.model:
        raise UserError("--endpoint_model is missing; give the name that the endpoint knows the model by")
    if config.behaviour != "robust":
        raise UserError(
            "behaviour=reference plays with token ids; use --teacher with a folder or SGLang servers for it"
        )
    client = ChatEndpoint(
        wish.url, wish.model, key=os.environ.get("OPENAI_API_KEY", ""), timeout=config.rollout.deadline
    )
    tools = wish.world.schemas
    shorten = functools.partial(_shorten, characters=CHARACTERS * config.agent.max_tool_tokens)
    budget = episode.Budget(config.agent.max_turns, config.agent.max_response, config.agent.seconds)

    async def play(task: Task, *, position: int, sample: int, attempt: int) -> Trajectory:
        async def ask(messages: list[dict[str, Any]], sampling: Sampling) -> Reply:
            key = f"reply {key_of(task, sample)} {digest(messages)}"
            if (found := wish.journal.get(key)) is not None:
                return Reply(**{**found, "calls": [ToolCall(**call) for call in found["calls"]]})
            reply = await client.reply(messages, tools, sampling)
            wish.journal.put(key, dataclasses.asdict(reply))
            return reply

        environment = wish.world.environment(shorten=shorten)
        seed = seed_of(config.seed, wish.phase, task.id, sample, attempt)
        player = MessagePolicy(ask, dataclasses.replace(wish.sampling, seed=seed))
        return await episode.play(player, environment, task, budget)

    return Teacher(
        remembered(play, wish.journal),
        Uncounted(tools),
        config.rollout.concurrency or 32,
        lambda: dict(client.counts),
        lambda: wish.loop.run(client.close()),
    )


def kind_of(config: Config, url: str) -> str:
    """Which of TEACHERS is meant."""
    return "endpoint" if url else config.rollout.engine


TEACHERS: dict[str, Callable[[PlayerSpec], Teacher]] = {"local": policy, "sglang": servers, "endpoint": endpoint}
