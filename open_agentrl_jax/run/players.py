"""Who plays an episode: the engine, the chat template and the environment of one way of sampling."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from open_agentrl_jax.agent import episode
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.behaviour import BEHAVIOURS, Behaviour
from open_agentrl_jax.config import Config
from open_agentrl_jax.reference import python_tool as published
from open_agentrl_jax.rewards.shaping import overlong_penalty, turn_bonus
from open_agentrl_jax.rollout.engine import Engine
from open_agentrl_jax.rollout.scheduler import EventLoop, Play, play_all
from open_agentrl_jax.run.world import World
from open_agentrl_jax.types import Group, Sampling, Task, Trajectory


def seed_of(*parts: Any) -> int:
    """31 bits that depend on all parts and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1


def shape_reward(trajectory: Trajectory, config: Config, behaviour: Behaviour) -> None:
    """Adds turn bonus and overlong penalty to the raw score; accuracy stays."""
    reward, metrics = config.reward, trajectory.metrics
    rounds = sum(bool(turn.tool_outputs) for turn in trajectory.turns)
    score = trajectory.reward
    if not behaviour.turn_bonus_dead:
        score = turn_bonus(score, 1 + len(trajectory.turns) + rounds, mode=reward.turn_bonus)
    length = metrics["response_length"] - (0 if reward.count_tool_tokens else metrics["tool_tokens"])
    penalty = overlong_penalty(
        int(length),
        max_length=config.agent.max_response,
        buffer=reward.overlong_buffer,
        factor=reward.overlong_factor,
    )
    metrics |= {"score": trajectory.reward, "overlong_penalty": penalty}
    trajectory.reward = score + penalty


@dataclasses.dataclass
class Player:
    """Plays episodes of one run with one way of sampling."""

    config: Config
    engine: Engine
    chat: Chat
    world: World
    sampling: Sampling
    phase: str

    async def __call__(self, task: Task, *, position: int, sample: int, attempt: int) -> Trajectory:
        """One episode; what it draws depends on seed, phase, position, sample and attempt alone."""
        config, agent = self.config, self.config.agent
        behaviour = BEHAVIOURS[config.behaviour]
        session = f"{self.phase}-{position}-{sample}-{attempt}"
        environment = self.world.environment(
            shorten=shortener(self.chat, agent.max_tool_tokens, behaviour), session=session
        )
        trajectory = await episode.run(
            self.engine,
            environment,
            self.chat,
            task,
            dataclasses.replace(self.sampling, seed=seed_of(config.seed, self.phase, position, sample, attempt)),
            episode.Budget(agent.max_turns, agent.max_response, agent.seconds),
            session=session,
            unreadable_call_ends=behaviour.first_call_only,
        )
        if not trajectory.aborted:
            shape_reward(trajectory, config, behaviour)
        return trajectory


def play_through(
    player: Play,
    tasks: Sequence[Task],
    samples: int,
    concurrency: int,
    loop: EventLoop,
    bar: Callable[[int, int], None],
    check: Callable[[], None] = lambda: None,
) -> list[Group]:
    """Every task `samples` times; `bar` is told (episodes done, of how many), `check` may raise to end it."""
    done = 0

    def on_episode() -> None:
        nonlocal done
        done += 1
        bar(done, len(tasks) * samples)

    playing = play_all(player, tasks, samples=samples, concurrency=concurrency, on_episode=on_episode)
    return loop.run(playing, check)


def shortener(chat: Chat, max_tokens: int, behaviour: Behaviour) -> Callable[[str], str]:
    """Cuts a tool's output to its budget."""
    if behaviour.tool_output_characters:
        return functools.partial(published.shorten_output, characters=behaviour.tool_output_characters)
    return functools.partial(chat.shorten, max_tokens=max_tokens)
