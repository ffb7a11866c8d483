"""Runs groups of episodes and hands them to the trainer batch by batch, with a bound on staleness.

The problem source is endless and indexed: a position names a problem, and position and sample number determine the seed
of an episode, so its random draws do not depend on when it runs. With max_staleness k, generation may run k weight
versions ahead:

    capacity = (max_staleness + version + 1) * prompts - (accepted + running)

groups may be started. k = 0 is synchronous training: one batch per version, in the order of positions.

The bound: batch n is trained at version n, and no group in it was started before version n - k. Nothing is dropped for
it. A batch waits until it can take so many of the oldest groups that later batches can still take the others in time;
the capacity law guarantees that this never exceeds one batch.

Several processes divide every batch by position (`Share`). Each has a scheduler of its own, to which "a batch" is its
share of one; `joined` makes one frontier of theirs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from open_agentrl_jax.types import Episode, Group, NothingToLearn, Task, Trajectory

ATTEMPTS = 3  # per episode, if the infrastructure fails
DROPPED_BATCHES = 32  # consecutive dropped groups, in batches, after which filter_groups gives up; a warning at 1/8

log = logging.getLogger(__name__)


class TaskSource(Protocol):
    """An endless source of problems; the same position always gives the same problem."""

    def __getitem__(self, position: int, /) -> Task: ...


class Play(Protocol):
    """Plays one episode of a problem."""

    def __call__(self, task: Task, *, position: int, sample: int, attempt: int) -> Awaitable[Trajectory | Episode]:
        """`position` and `sample` determine the random draws; `attempt` counts from 0."""
        ...


@dataclasses.dataclass
class Frontier:
    """Progress in the problem source: positions below `next` are trained, dropped, or listed as pending."""

    next: int = 0
    pending: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Share:
    """The positions that one of `count` processes plays: every `count`-th place of each batch of `prompts`."""

    prompts: int
    index: int = 0
    count: int = 1

    @property
    def places(self) -> range:
        """The process's places in a batch; empty if there are more processes than prompts."""
        return range(self.index, self.prompts, self.count)

    def owns(self, position: int) -> bool:
        """Whether this process plays `position`."""
        return position % self.prompts % self.count == self.index

    def following(self, position: int) -> int:
        """The first own position from `position` on."""
        while not self.owns(position):
            position += 1
        return position

    def pending(self, frontier: Frontier) -> list[int]:
        """The pending positions that this process plays, whichever process started them."""
        return sorted(frontier.pending)[self.index :: self.count]


def joined(frontiers: Sequence[Frontier], prompts: int) -> Frontier:
    """The frontier of a run whose processes, in this order, are at `frontiers`.

    Positions that one process has not reached yet are pending if another process is beyond them.
    """
    end = max(frontier.next for frontier in frontiers)
    pending = [position for frontier in frontiers for position in frontier.pending]
    for index, frontier in enumerate(frontiers):
        share = Share(prompts, index, len(frontiers))
        pending += [position for position in range(frontier.next, end) if share.owns(position)]
    return Frontier(end, sorted(pending))


class EventLoop:
    """An event loop in its own thread, so that the trainer's thread can wait for devices."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future:
        """Starts a coroutine and returns a future for use in other threads."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, Any], check: Callable[[], None] = lambda: None) -> Any:
        """Runs a coroutine to completion; `check` runs twice per second and may raise to cancel it."""
        future = self.submit(coroutine)
        while True:
            try:
                return future.result(timeout=0.5)
            except TimeoutError:
                if future.done():  # raised by the coroutine itself
                    raise
            try:
                check()
            except BaseException:
                future.cancel()
                raise

    def close(self) -> None:
        """Cancels running tasks and joins the thread."""

        async def cancel_all() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        if self._thread.is_alive():
            self.run(cancel_all())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout=10)
            self.loop.close()


async def play_group(
    play: Play, task: Task, position: int, samples: int, limit: asyncio.Semaphore, on_episode: Callable[[], None]
) -> Group:
    """Plays all samples of one problem; an episode that the infrastructure fails is retried, then kept as aborted."""

    async def one(sample: int) -> Trajectory | Episode:
        for attempt in range(ATTEMPTS):
            async with limit:
                trajectory = await play(task, position=position, sample=sample, attempt=attempt)
            if not trajectory.aborted or trajectory.faulted or trajectory.metrics.get("timed_out"):
                break  # playing it again would take as long, or raise again
        trajectory.metrics["attempts"] = float(attempt + 1)
        on_episode()
        return trajectory

    trajectories = await asyncio.gather(*(one(sample) for sample in range(samples)))
    return Group(task, list(trajectories), position)


async def play_all(
    play: Play,
    tasks: Sequence[Task] | Mapping[int, Task],
    *,
    samples: int,
    concurrency: int,
    on_episode: Callable[[], None] = lambda: None,
) -> list[Group]:
    """Plays a finite number of problems, `samples` times each; positions are indices, or keys of a mapping."""
    limit = asyncio.Semaphore(concurrency)
    placed = tasks if isinstance(tasks, Mapping) else dict(enumerate(tasks))
    groups = (play_group(play, task, i, samples, limit, on_episode) for i, task in placed.items())
    return list(await asyncio.gather(*groups))


class Scheduler:
    """Keeps episodes running up to the capacity law and hands out batches of groups."""

    def __init__(
        self,
        loop: EventLoop,
        play: Play,
        tasks: TaskSource,
        *,
        prompts: int,
        samples: int,
        concurrency: int,
        batches: int,
        max_staleness: int = 0,
        filter_groups: bool = False,
        share: Share | None = None,
        frontier: Frontier | None = None,
        version: int = 0,
        on_episode: Callable[[], None] = lambda: None,
    ):
        """Starts immediately.

        Args:
            loop: where episodes run.
            play: plays one episode.
            tasks: the problems.
            prompts: groups per batch, over all processes.
            samples: episodes per group.
            concurrency: concurrent episodes.
            batches: of the whole run; groups beyond them are not started.
            max_staleness: weight versions that generation may run ahead.
            filter_groups: drop groups whose raw accuracies are all equal and play the next problem instead.
            share: the places of a batch that this process plays; default: all.
            frontier: where a resumed run continues, over all processes.
            version: weight version that the engine samples from.
            on_episode: called in the loop's thread after each episode.
        """
        frontier = frontier or Frontier()
        self._loop, self._play, self._tasks = loop, play, tasks
        self._share = share or Share(prompts)
        self._prompts, self._drop_limit = len(self._share.places), DROPPED_BATCHES * prompts
        self._samples, self._batches, self._staleness = samples, batches, max_staleness
        self._filter, self._on_episode, self._concurrency = filter_groups, on_episode, concurrency
        self._redo, self._next = self._share.pending(frontier), frontier.next
        self._version, self._accepted = version, version * self._prompts
        self._untrained = set(self._redo)  # neither trained nor dropped
        self._running: set[asyncio.Task] = set()
        self._batch = version  # number of the next batch, which is the version that it trains
        self._born: dict[int, int] = {}  # position -> version at its start, of groups that no batch has taken
        self._ready: list[Group] = []  # finished, in this order
        self._done: queue.Queue[Group | BaseException] = queue.Queue()
        self._lock = threading.Lock()
        self._dropped = self._dropped_in_a_row = 0
        loop.run(self._begin())

    async def _begin(self) -> None:
        self._limit = asyncio.Semaphore(self._concurrency)
        self._fill()

    def _fill(self) -> None:
        """Starts groups while there is capacity (in the loop's thread)."""
        ahead = min(self._staleness + self._version + 1, self._batches)
        capacity = ahead * self._prompts - (self._accepted + len(self._running))
        for _ in range(capacity):
            with self._lock:
                position = self._redo.pop(0) if self._redo else self._share.following(self._next)
                self._next = max(self._next, position + 1)
                self._untrained.add(position)
                self._born[position] = self._version
            task = asyncio.ensure_future(self._group(position))
            self._running.add(task)
            task.add_done_callback(self._finished)

    async def _group(self, position: int) -> Group:
        task = self._tasks[position]
        return await play_group(self._play, task, position, self._samples, self._limit, self._on_episode)

    def _finished(self, task: asyncio.Task) -> None:
        self._running.discard(task)
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            self._done.put(error)
            return
        group = task.result()
        if self._filter and group.all_equal:
            with self._lock:
                self._untrained.discard(group.position)
                del self._born[group.position]
            if not self._drop():
                return
        else:
            self._accepted += 1
            self._dropped_in_a_row = 0
            self._done.put(group)
        self._fill()

    def _drop(self) -> bool:
        """Counts a dropped group; False ends the run, because no problem teaches anything any more."""
        self._dropped += 1
        self._dropped_in_a_row += 1
        message = (
            f"rl.filter_groups: all samples have the same accuracy in {self._dropped_in_a_row} consecutive problems; "
            "choose problems of medium difficulty (launch.curate), or set rl.filter_groups to False"
        )
        if self._dropped_in_a_row == self._drop_limit // 8:
            log.warning("%s", message)
        if self._dropped_in_a_row >= self._drop_limit:
            self._done.put(NothingToLearn(message))
        return self._dropped_in_a_row < self._drop_limit

    def next_batch(self, check: Callable[[], None] = lambda: None) -> list[Group]:
        """Waits for this process's share of the next batch and returns it in the order of the positions.

        Args:
            check: called twice per second while waiting; may raise to stop. No group is lost by that: groups that were
                not returned are not trained, hence pending.

        Raises:
            NothingToLearn: `filter_groups` finds nothing to train on.
        """
        while self._prompts:
            check()
            if groups := self._take():
                return sorted(groups, key=lambda group: group.position)
            try:
                item = self._done.get(timeout=0.5)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            self._ready.append(item)
        return []

    def _take(self) -> list[Group]:
        """The groups of the next batch, oldest first; empty while the batch must wait."""
        with self._lock:
            born = self._born
            ready = sorted(self._ready, key=lambda group: born[group.position])
            for version in range(self._batch - self._staleness, self._batch + 1):
                # Later batches can still take `room` of the groups that were started up to `version`.
                room = (version + self._staleness - self._batch) * self._prompts
                due = sum(one <= version for one in born.values()) - room
                if due > sum(born[group.position] <= version for group in ready):
                    return []
            if len(ready) < self._prompts:
                return []
            groups, self._ready = ready[: self._prompts], ready[self._prompts :]
            self._batch += 1
            for group in groups:
                del born[group.position]
            return groups

    def metrics(self) -> dict[str, float]:
        """Counts since the start."""
        return {"rollout/groups_dropped": float(self._dropped)}

    def trained(self, groups: Iterable[Group]) -> Frontier:
        """Marks groups as trained and returns the frontier that a checkpoint stores."""
        with self._lock:
            self._untrained -= {group.position for group in groups}
            return Frontier(self._next, sorted(self._untrained))

    def published(self, version: int) -> None:
        """Notes that the engine samples from `version` now, and starts more groups."""

        async def advance() -> None:
            self._version = version
            self._fill()

        self._loop.run(advance())

    def close(self) -> None:
        """Cancels the running episodes."""

        async def cancel() -> None:
            for task in list(self._running):
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

        self._loop.run(cancel())
