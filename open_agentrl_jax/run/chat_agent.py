"""A trained model with its tools, for the terminal and for the endpoint."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from open_agentrl_jax.agent import episode
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.environment import ungraded
from open_agentrl_jax.config import Config
from open_agentrl_jax.models import hf
from open_agentrl_jax.rollout.engine import Engine
from open_agentrl_jax.rollout.local import LocalEngine
from open_agentrl_jax.run.policy import load_policy, make_chat, open_folder
from open_agentrl_jax.run.world import World, open_world
from open_agentrl_jax.serve.streaming import Listener, reply
from open_agentrl_jax.types import Message, Sampling, Trajectory, UserError


@dataclasses.dataclass
class Agent:
    """A loaded model with its tools, ready to answer."""

    config: Config
    chat: Chat
    engine: Engine
    world: World
    name: str
    _sessions: itertools.count = dataclasses.field(default_factory=itertools.count)

    async def answer(
        self, history: list[Message], sampling: Sampling, listen: Listener, *, max_tokens: int = 0
    ) -> Trajectory:
        """Answers one conversation and streams the answer to `listen`; `max_tokens` 0: as in the config.

        Raises:
            UserError: the conversation is too long for the model.
        """
        agent = self.config.agent
        length = len(self.chat.prompt(history))
        if length > agent.max_prompt:
            raise UserError(
                f"the conversation has {length} tokens, agent.max_prompt is {agent.max_prompt}; begin anew (/reset)"
            )
        session = f"chat-{next(self._sessions)}"
        environment = self.world.environment(
            shorten=lambda text: self.chat.shorten(text, agent.max_tool_tokens), session=session, reward=ungraded
        )
        budget = episode.Budget(agent.max_turns, min(max_tokens or agent.max_response, agent.max_response))
        return await reply(
            self.engine,
            self.chat,
            environment,
            history,
            sampling,
            dataclasses.replace(budget, seconds=agent.seconds),
            listen,
            session=session,
        )


def config_of(model: str) -> Config:
    """A config with the budgets and the sandbox of the run that the model lies in."""
    config = Config(name="chat")
    mark = Path(model).absolute().parent / "config.json"
    if mark.exists():
        try:
            run = json.loads(mark.read_text())["config"]
            config.behaviour = run["behaviour"]
            for section in ("agent", "sandbox"):
                setattr(config, section, _updated(getattr(config, section), run[section]))
        except (ValueError, KeyError, TypeError):
            pass  # another tool's config.json: keep the defaults
    config.model.path = model
    return config


def _updated(section: Any, saved: dict[str, Any]) -> Any:
    """Returns a config section with the saved values of its fields, sections within it included."""
    values = {}
    for field in dataclasses.fields(section):
        if field.name in saved:
            own, value = getattr(section, field.name), saved[field.name]
            values[field.name] = _updated(own, value) if dataclasses.is_dataclass(own) else value
    return dataclasses.replace(section, **values)


def open_agent(model: str, *, slots: int, max_response: int = 0, max_turns: int = 0) -> tuple[Agent, LocalEngine]:
    """Loads the model. A conversation may fill whatever its context leaves beside one answer.

    Args:
        model: a Hugging Face folder or Hub id.
        slots: concurrent answers.
        max_response: tokens per answer, tool outputs included; 0: as in the run, at most half of the context.
        max_turns: assistant turns per answer; 0: as in the run.

    Raises:
        UserError: there is no such model, or `max_response` leaves no room for a question.
    """
    config = config_of(model)
    policy = load_policy(config, open_folder(config, Path(model)))
    context = policy.config.max_position_embeddings
    if max_response >= context:
        raise UserError(f"max_response={max_response}: the model's context is {context}; lower it")
    config.agent.max_response = max_response or min(config.agent.max_response, context // 2)
    config.agent.max_turns = max_turns or config.agent.max_turns
    # A conversation holds several questions and answers, where a training prompt holds one problem.
    config.agent.max_prompt = min(context - config.agent.max_response, max(8192, config.agent.max_prompt))
    engine = LocalEngine(
        policy.whole(),
        policy.config,
        slots=slots,
        max_length=config.agent.max_prompt + config.agent.max_response,
        mesh=policy.mesh,
    )
    world = open_world(config)
    name = Path(hf.resolve(model)).absolute()
    name = f"{name.parent.name}/{name.name}" if name.name == "export" else name.name
    return Agent(config, make_chat(config, policy.tokenizer, world.schemas), engine, world, name), engine
