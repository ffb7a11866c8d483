"""Plays episodes of a run: one engine, chat template, world and way of sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence

from open_agentrl_jax.agent import episode, harness
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.agent.transcript import Chats, Transcript
from open_agentrl_jax.config import Config, row_config
from open_agentrl_jax.reference.behaviour import BEHAVIOURS
from open_agentrl_jax.rewards.shaping import overlong_penalty, turn_bonus
from open_agentrl_jax.rollout.engine import Engine, seed_of
from open_agentrl_jax.rollout.scheduler import EventLoop, Play, play_all
from open_agentrl_jax.run.world import World
from open_agentrl_jax.types import Episode, Group, Sampling, Task, Trajectory


def shape_reward(trajectory: Trajectory | Episode, config: Config) -> None:
    """Adds turn bonus and overlong penalty to the grader's score; accuracy is unchanged."""
    reward, metrics = config.reward, trajectory.metrics
    rounds = sum(bool(turn.tool_outputs) for turn in trajectory.turns)
    bonus = BEHAVIOURS[config.behaviour].turn_bonus or turn_bonus
    score = bonus(trajectory.reward, 1 + len(trajectory.turns) + rounds, mode=reward.turn_bonus)
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

    def __post_init__(self) -> None:
        self._chats = Chats(self.chat)

    async def __call__(self, task: Task, *, position: int, sample: int, attempt: int) -> Trajectory | Episode:
        """Plays one episode; its random draws depend on seed, phase, position, sample and attempt alone."""
        config, agent = self.config, self.config.agent
        behaviour = BEHAVIOURS[config.behaviour]
        session = f"{self.phase}-{position}-{sample}-{attempt}"
        sampling = dataclasses.replace(self.sampling, seed=seed_of(config.seed, self.phase, position, sample, attempt))
        budget = episode.Budget(agent.max_turns, agent.max_response, agent.seconds)
        if self.world.harness is not None:
            trajectory = await self._with_harness(self.world.harness, task, sampling, budget, session)
        else:
            environment = self.world.environment(
                shorten=behaviour.shortener(self.chat, agent.max_tool_tokens), session=session
            )
            trajectory = await episode.run(
                self.engine,
                environment,
                self.chat,
                task,
                sampling,
                budget,
                session=session,
                unreadable_call_ends=behaviour.first_call_only,
            )
        if not trajectory.aborted:
            shape_reward(trajectory, config)
        return trajectory

    async def _with_harness(
        self, agent: harness.Harness, task: Task, sampling: Sampling, budget: episode.Budget, session: str
    ) -> Episode:
        transcript = Transcript(
            self.engine,
            self._chats,
            sampling,
            budget,
            max_prompt=self.config.agent.max_prompt,
            session=session,
            max_sampled=self.config.agent.harness.max_tokens,
        )
        world = self.world
        return await harness.play(agent, world.endpoint, transcript, task, world.reward, seconds=budget.seconds)


def player_of(config: Config, engine: Engine, chat: Chat, world: World, sampling: Sampling, phase: str) -> Play:
    """What plays the problems of a run: one Player, or one for each row of `data.sources`."""
    own = Player(config, engine, chat, world, sampling, phase)
    rows = [
        Player(row_config(config, source), engine, chat.showing(row.schemas), row, sampling, phase)
        for source, row in zip(config.data.sources, world.rows, strict=False)
    ]

    def play(task: Task, *, position: int, sample: int, attempt: int) -> Awaitable[Trajectory | Episode]:
        player = rows[task.extra["row"]] if "row" in task.extra else own
        return player(task, position=position, sample=sample, attempt=attempt)

    return play if rows else own


def play_through(
    player: Play,
    tasks: Sequence[Task] | Mapping[int, Task],
    samples: int,
    concurrency: int,
    loop: EventLoop,
    bar: Callable[[int, int], None],
    check: Callable[[], None] = lambda: None,
) -> list[Group]:
    """Plays every task `samples` times.

    Args:
        player: plays one episode.
        tasks: problems; the keys of a mapping are their positions.
        samples: episodes per problem.
        concurrency: concurrent episodes.
        loop: where episodes run.
        bar: called with (episodes done, episodes in all).
        check: called twice a second; may raise to stop.
    """
    done = 0

    def on_episode() -> None:
        nonlocal done
        done += 1
        bar(done, len(tasks) * samples)

    playing = play_all(player, tasks, samples=samples, concurrency=concurrency, on_episode=on_episode)
    return loop.run(playing, check)
