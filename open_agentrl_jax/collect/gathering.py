"""Where samples of an SFT set come from: a teacher's episodes, or annotated solutions."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.collect import collection, teachers
from open_agentrl_jax.collect.journal import Journal
from open_agentrl_jax.collect.stitched import NotStitchable, stitch
from open_agentrl_jax.config import Config
from open_agentrl_jax.rollout.scheduler import EventLoop
from open_agentrl_jax.run import inputs
from open_agentrl_jax.run.players import play_through
from open_agentrl_jax.run.world import open_world
from open_agentrl_jax.telemetry.screen import Screen
from open_agentrl_jax.types import Sampling, Task, UserError


@dataclasses.dataclass
class Gathering:
    """One collection; `card` is filled on the way."""

    config: Config
    output: Path
    contaminated: collection.Contamination
    card: dict[str, Any]
    screen: Screen
    model: str  # a folder, a Hub id, or a name on the endpoint
    url: str  # of the endpoint; "" for none
    tries: int  # trajectories per problem
    limit: int  # problems; 0: all


def choose(work: Gathering, chat: Any) -> list[Task]:
    """The problems to play; contaminated ones are left out before they cost a call."""
    train = work.config.data.problems
    mixture, notes = inputs.training_problems(work.config, chat)
    tasks = list(mixture)[: work.limit or None]
    clean = [task for task in tasks if not work.contaminated(collection.problem_of(task))]
    if not clean:
        raise UserError(f"data.train {train}: all {len(tasks)} problems are in an evaluation set; use other ones")
    for note in notes:
        work.screen.say(note)
    work.card["problems"] = {"read": len(tasks), "contaminated": len(tasks) - len(clean), "used": len(clean)}
    work.card["made"]["left out"] = "; ".join(notes) or "nothing"
    return clean


def real(work: Gathering) -> tuple[list[collection.Sample], dict[str, int]]:
    """Plays every problem with the teacher; returns usable samples and counts by reason."""
    config, model, url = work.config, work.model, work.url
    sampling = Sampling(0, config.rollout.temperature, config.rollout.top_p, config.rollout.top_k)
    loop = EventLoop()
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        journal = Journal(work.output, "journal", teachers.settings(config, model, sampling, "collect", url=url))
        stack.callback(journal.close)
        world = open_world(config)
        stack.callback(lambda: loop.run(world.close()))
        spec = teachers.PlayerSpec(config, work.output, loop, world, journal, sampling, "collect", model=model, url=url)
        teacher = teachers.TEACHERS[teachers.kind_of(config, url)](spec)
        tasks = choose(work, teacher.chat)
        player = teacher.start()
        stack.callback(player.close)
        groups = play_through(
            player.play,
            tasks,
            work.tries,
            player.concurrency,
            loop,
            lambda done, total: work.screen.bar("collect", done, total),
        )
        work.card["made"] |= {"teacher": f"{model} at {url}" if url else model, "tries per problem": work.tries}
        work.card["teacher"] = {**player.counts(), "calls saved by the journal": journal.saved}
    counts: collections.Counter[str] = collections.Counter({name: 0 for name, _ in collection.CHECKS})
    samples = []
    for group in groups:
        for number, trajectory in enumerate(group.trajectories):
            if reason := collection.refusal(trajectory):
                counts[reason] += 1
            else:
                samples.append(collection.sample_of(group.task, trajectory, number, teacher.chat.tools))
    work.card["problems"]["solved"] = sum(any(t.accuracy == 1 for t in group.trajectories) for group in groups)
    return samples, {"tries": len(tasks) * work.tries, **counts}


def stitched(work: Gathering) -> tuple[list[collection.Sample], dict[str, int]]:
    """Turns annotated solutions into samples; returns them and counts by reason."""
    tasks = choose(work, teachers.Uncounted([PythonTool.schema]))
    counts, samples = collections.Counter[str](), []
    for task in tasks:
        try:
            samples.append(stitch(task))
        except NotStitchable as error:
            counts[str(error)] += 1
    return samples, {"tries": len(tasks), **counts}


STYLES = {"real": real, "stitched": stitched}
