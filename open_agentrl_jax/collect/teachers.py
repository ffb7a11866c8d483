"""Who plays episodes outside of training: our model, SGLang servers with their own weights, or a chat endpoint."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from open_agentrl_jax.agent import episode, templates
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.collect.endpoint import ChatEndpoint, MessagePolicy, Reply
from open_agentrl_jax.collect.journal import Journal, RememberingEngine, digest, key_of, remembered
from open_agentrl_jax.config import Config, to_dict
from open_agentrl_jax.models import hf
from open_agentrl_jax.rollout.engine import seed_of
from open_agentrl_jax.rollout.scheduler import EventLoop, Play
from open_agentrl_jax.run.engines import open_generation
from open_agentrl_jax.run.players import Player
from open_agentrl_jax.run.policy import load_policy, make_chat, open_folder
from open_agentrl_jax.run.world import World
from open_agentrl_jax.text import cut_middle
from open_agentrl_jax.types import Sampling, Task, ToolCall, Trajectory, Turn, UserError


@dataclasses.dataclass
class PlayerSpec:
    """What to open, and the journal of its answers."""

    config: Config
    directory: Path  # scratch of engines
    loop: EventLoop
    world: World
    journal: Journal
    sampling: Sampling
    phase: str
    model: str = ""  # a folder or Hub id; for an endpoint, its name on the server
    url: str = ""  # of the endpoint


@dataclasses.dataclass
class Playing:
    """A teacher that was started."""

    play: Play
    concurrency: int
    counts: Callable[[], dict[str, int]]
    close: Callable[[], None]


@dataclasses.dataclass
class Teacher:
    """A teacher before any weights are read: `chat` counts the tokens of prompts, so that data is checked first."""

    chat: Any  # a Chat, or Uncounted
    start: Callable[[], Playing]


def settings(config: Config, model: str, sampling: Sampling, phase: str, *, url: str = "", tools: bool = True) -> Any:
    """Everything that decides what an episode holds, for the name of its journal."""
    tree = to_dict(config)
    kept = {name: tree[name] for name in ("seed", "behaviour", "agent", "reward")}
    kept["sandbox"] = {name: tree["sandbox"][name] for name in ("timeout", "memory_mb")}
    kept["template"] = config.model.template
    weights = [] if url else sorted(identity(model))
    return {
        **kept, "model": model, "weights": weights, "endpoint": url, "phase": phase, "tools": tools,
        "sampling": dataclasses.asdict(sampling), "turn": [field.name for field in dataclasses.fields(Turn)],
    }  # fmt: skip


def identity(model: str) -> list[tuple[str, int, int]]:
    """Name, size and time of each weight file of a folder; nothing for a Hub id."""
    files = Path(model).glob("*.safetensors") if Path(model).is_dir() else ()
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def policy(spec: PlayerSpec) -> Teacher:
    """Our model on the engine of the config; the journal keeps its finished episodes."""
    config = spec.config
    config.model.path = spec.model
    folder = open_folder(config, spec.directory)
    chat = make_chat(config, folder.tokenizer, spec.world.schemas)

    def start() -> Playing:
        loaded = load_policy(config, folder)
        generation = open_generation(config, loaded, spec.loop, spec.directory)
        try:
            generation.publish(loaded.params, 0)
        except BaseException:
            generation.close()
            raise
        engine, counts = generation.evaluation, dict
        if spec.phase == "collect":
            engine = RememberingEngine(engine, spec.journal)
            counts = lambda: {"calls": engine.calls}  # noqa: E731
        play = Player(config, engine, chat, spec.world, spec.sampling, spec.phase)
        return Playing(remembered(play, spec.journal), generation.concurrency, counts, generation.close)

    return Teacher(chat, start)


def servers(spec: PlayerSpec) -> Teacher:
    """SGLang servers with the weights they were started with; nothing is loaded here."""
    from transformers import AutoConfig, AutoTokenizer

    from open_agentrl_jax.rollout.servers import LaunchedServers
    from open_agentrl_jax.rollout.sglang import SGLangPool

    config, rollout = spec.config, spec.config.rollout
    try:
        tokenizer, shape = (of.from_pretrained(spec.model) for of in (AutoTokenizer, AutoConfig))
    except Exception as error:
        raise UserError(f"teacher {spec.model}: {' '.join(str(error).split())[:300]}") from error
    templates.use(tokenizer, config.model.template)
    chat = Chat(tokenizer, spec.world.schemas)

    def start() -> Playing:
        context = config.agent.max_prompt + config.agent.max_response
        urls, launched = tuple(rollout.servers), None
        if rollout.launch_servers:
            launched = LaunchedServers(
                hf.resolve(spec.model),
                rollout.launch_servers,
                log_dir=spec.directory / "servers",
                context_length=context,
                max_tokens=rollout.slots * context,
            )
            launched.wait()
            urls += tuple(launched.urls)
        pool = SGLangPool(urls, vocab_size=shape.vocab_size, context_length=context, deadline=rollout.deadline)

        def close() -> None:
            spec.loop.run(pool.close())
            if launched is not None:
                launched.close()

        spec.loop.run(pool.open())
        engine = RememberingEngine(pool.for_evaluation(), spec.journal)
        play = Player(config, engine, chat, spec.world, spec.sampling, spec.phase)
        concurrency = rollout.concurrency or 256 * len(urls)
        return Playing(remembered(play, spec.journal), concurrency, lambda: {"calls": engine.calls}, close)

    return Teacher(chat, start)


class Uncounted:
    """Stands in for a Chat where there is no tokenizer: an endpoint counts the tokens of its prompts itself."""

    def __init__(self, tools: Sequence[Any]):
        self.tools = list(tools)

    def prompt(self, messages: Sequence[Any]) -> list[int]:
        """No tokens."""
        return []


CHARACTERS = 4  # per token, about; without a tokenizer, tool outputs are cut by characters


def endpoint(spec: PlayerSpec) -> Teacher:
    """An OpenAI-compatible endpoint; the journal keeps each reply, those of unfinished episodes included."""
    config = spec.config
    if not spec.model:
        raise UserError("endpoint_model is missing; give the model's name on the endpoint")
    if config.behaviour != "robust":
        raise UserError("behaviour=reference needs token ids; use a folder or SGLang servers in place of an endpoint")
    client = ChatEndpoint(
        spec.url, spec.model, key=os.environ.get("OPENAI_API_KEY", ""), timeout=config.rollout.deadline
    )
    tools = spec.world.schemas
    shorten = functools.partial(cut_middle, characters=CHARACTERS * config.agent.max_tool_tokens)
    budget = episode.Budget(config.agent.max_turns, config.agent.max_response, config.agent.seconds)

    async def play(task: Task, *, position: int, sample: int, attempt: int) -> Trajectory:
        async def ask(messages: list[dict[str, Any]], sampling: Sampling) -> Reply:
            key = f"reply {key_of(task, sample)} {digest(messages)}"
            if (found := spec.journal.get(key)) is not None:
                return Reply(**{**found, "calls": [ToolCall(**call) for call in found["calls"]]})
            reply = await client.reply(messages, tools, sampling)
            spec.journal.put(key, dataclasses.asdict(reply))
            return reply

        seed = seed_of(config.seed, spec.phase, task.id, sample, attempt)
        policy = MessagePolicy(ask, dataclasses.replace(spec.sampling, seed=seed))
        return await episode.play(policy, spec.world.environment(shorten=shorten), task, budget)

    def close() -> None:
        spec.loop.run(client.close())

    playing = Playing(
        remembered(play, spec.journal), config.rollout.concurrency or 32, lambda: dict(client.counts), close
    )
    return Teacher(Uncounted(tools), lambda: playing)


def kind_of(config: Config, url: str) -> str:
    """The key of TEACHERS."""
    return "endpoint" if url else config.rollout.engine


TEACHERS: dict[str, Callable[[PlayerSpec], Teacher]] = {"local": policy, "sglang": servers, "endpoint": endpoint}
