"""Capacity law, order, refills, retries, staleness and the frontier a checkpoint stores."""

import asyncio
import random
import threading

import numpy as np
import pytest

from open_agentrl_jax.rollout.scheduler import ATTEMPTS, EventLoop, Frontier, Scheduler, Share, joined, play_all
from open_agentrl_jax.types import Message, NothingToLearn, Task, Trajectory


class Problems:
    def __getitem__(self, position):
        return Task(str(position), [Message("user", str(position))], "")


def trajectory(accuracy=1.0, stop="answer"):
    empty = np.zeros(0, np.int32)
    return Trajectory(empty, empty.astype(bool), empty.astype(np.float32), empty, [], stop, accuracy=accuracy)


class Play:
    """Episodes of random length; remembers what was started and when."""

    def __init__(self, accuracy=lambda position, sample: 1.0, fail=lambda *_: False):
        self.accuracy, self.fail = accuracy, fail
        self.started, self.running, self.most = [], 0, 0

    async def __call__(self, task, *, position, sample, attempt):
        self.started.append((position, sample, attempt))
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(random.random() * 0.01)
        self.running -= 1
        stop = "aborted" if self.fail(position, sample, attempt) else "answer"
        return trajectory(self.accuracy(position, sample), stop)


@pytest.fixture
def loop():
    made = EventLoop()
    yield made
    made.close()


def schedule(loop, play, **kwargs):
    defaults = {"prompts": 4, "samples": 2, "concurrency": 8, "batches": 10}
    return Scheduler(loop, play, Problems(), **{**defaults, **kwargs})


def test_synchronous_batches_come_one_a_version_in_order(loop):
    play = Play()
    scheduler = schedule(loop, play)
    for version in range(3):
        batch = scheduler.next_batch()
        assert [g.position for g in batch] == list(range(4 * version, 4 * version + 4))
        assert len(play.started) == 8 * (version + 1)  # nothing runs ahead
        assert scheduler.trained(batch) == Frontier(4 * version + 4, [])
        scheduler.published(version + 1)
    assert play.most <= 8


def test_staleness_lets_generation_run_ahead_and_no_further(loop):
    play = Play()
    scheduler = schedule(loop, play, max_staleness=1)
    first = scheduler.next_batch()
    second = scheduler.next_batch()  # without any publish: one version ahead
    assert len({g.position for g in first + second}) == 8
    loop.run(asyncio.sleep(0.05))
    assert len(play.started) == 16
    scheduler.published(1)
    scheduler.next_batch()
    assert len(play.started) == 24


def test_equal_groups_are_dropped_and_the_next_problems_played(loop):
    """Fault 18 of the reference: the switch was set and never passed. Positions 1 and 2 teach nothing."""
    play = Play(accuracy=lambda position, sample: 1.0 if position in (1, 2) else float(sample))
    scheduler = schedule(loop, play, filter_groups=True)
    assert [g.position for g in scheduler.next_batch()] == [0, 3, 4, 5]
    assert scheduler.metrics() == {"rollout/groups_dropped": 2}
    assert scheduler.trained([]).pending == [0, 3, 4, 5]


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 3])
def test_no_group_is_older_than_the_bound(loop, max_staleness):
    """Durations of episodes vary a hundredfold; without the bound, slow groups of early versions train late."""
    version, born = 0, {}

    async def play(task, *, position, sample, attempt):
        born.setdefault(position, version)
        await asyncio.sleep(0.1 if position in (1, 6, 7, 13) else 0.001)
        return trajectory()

    scheduler = schedule(loop, play, concurrency=100, batches=12, max_staleness=max_staleness)
    ages, seen = [], []
    for version in range(12):
        scheduler.published(version)
        batch = scheduler.next_batch()
        ages += [version - born[group.position] for group in batch]
        seen += [group.position for group in batch]
        scheduler.trained(batch)
    assert sorted(seen) == list(range(48))
    assert max(ages) == max_staleness


def test_groups_without_signal_end_the_run(loop, monkeypatch, caplog):
    monkeypatch.setattr("open_agentrl_jax.rollout.scheduler.DROPPED_BATCHES", 8)
    play = Play()
    scheduler = schedule(loop, play, filter_groups=True)
    with pytest.raises(NothingToLearn, match=r"^rl\.filter_groups: .* 32 consecutive problems"):
        scheduler.next_batch()
    loop.run(asyncio.sleep(0.05))
    assert len({position for position, _, _ in play.started}) <= 36  # nothing is started afterwards
    assert "4 consecutive problems" in caplog.text
    scheduler.close()


def test_no_group_is_started_that_no_batch_needs(loop):
    play = Play()
    scheduler = schedule(loop, play, batches=1, max_staleness=3)
    scheduler.next_batch()
    scheduler.published(1)
    loop.run(asyncio.sleep(0.03))
    assert len(play.started) == 8


def test_what_the_infrastructure_lost_is_played_again_then_kept_as_aborted(loop):
    play = Play(fail=lambda position, sample, attempt: (position == 2 and sample == 1) or (position, attempt) == (0, 0))
    batch = schedule(loop, play).next_batch()
    assert [t.aborted for g in batch for t in g.trajectories] == [False] * 5 + [True] + [False] * 2
    assert batch[0].trajectories[0].metrics["attempts"] == 2
    assert [a for p, s, a in play.started if (p, s) == (2, 1)] == list(range(ATTEMPTS))


def test_a_resumed_run_goes_on_at_the_frontier(loop):
    scheduler = schedule(loop, Play(), frontier=Frontier(9, [3, 5]), version=2)
    batch = scheduler.next_batch()
    assert [g.position for g in batch] == [3, 5, 9, 10]
    assert scheduler.trained(batch) == Frontier(11, [])


def test_an_error_reaches_the_trainer(loop):
    class Broken:
        async def __call__(self, task, **kwargs):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        schedule(loop, Broken()).next_batch()


def test_waiting_can_be_interrupted_and_loses_nothing(loop):
    class Never:
        async def __call__(self, task, **kwargs):
            await asyncio.sleep(60)

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    scheduler = schedule(loop, Never())
    with pytest.raises(Stop):
        scheduler.next_batch(stop)
    assert scheduler.trained([]) == Frontier(4, [0, 1, 2, 3])
    scheduler.close()


def test_a_thousand_episodes_of_a_list(loop):
    play = Play()
    tasks = [Problems()[i] for i in range(125)]
    groups = loop.run(play_all(play, tasks, samples=8, concurrency=256))
    assert [g.task.id for g in groups] == [t.id for t in tasks]
    assert all(len(g.trajectories) == 8 for g in groups) and play.most <= 256


def test_waiting_for_episodes_ends_when_the_check_says_so():
    loop, cancelled = EventLoop(), threading.Event()

    async def forever():
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        loop.run(forever(), stop)
    assert cancelled.wait(5)

    async def times_out():
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        loop.run(times_out())
    loop.close()


def shares(loop, play, count, **settings):
    return [schedule(loop, play, prompts=4, share=Share(4, index, count), **settings) for index in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_processes_divide_every_batch(loop, count):
    several = shares(loop, Play(), count)
    for version in range(3):
        batches = [scheduler.next_batch() for scheduler in several]
        positions = [[group.position for group in batch] for batch in batches]
        assert positions == [[4 * version + place for place in range(index, 4, count)] for index in range(count)]
        frontiers = [scheduler.trained(batch) for scheduler, batch in zip(several, batches, strict=True)]
        assert joined(frontiers, 4) == Frontier(4 * version + 4, [])
        for scheduler in several:
            scheduler.published(version + 1)
    for scheduler in several:
        scheduler.close()


@pytest.mark.parametrize("counts", [(1, 3), (3, 1), (2, 4), (4, 2), (2, 2)])
@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_run_continues_on_another_number_of_processes(loop, counts, max_staleness):
    """Dropped groups and episodes in flight leave gaps; every problem is trained or dropped once, none is lost."""
    drop = lambda position: position % 5 == 0 or position in (1, 2, 3)  # noqa: E731
    trained, frontier = [], Frontier()
    for start, count in zip((0, 3), counts, strict=True):
        play = Play(accuracy=lambda position, sample: 1.0 if drop(position) else float(sample))
        settings = {"filter_groups": True, "frontier": frontier, "version": start, "max_staleness": max_staleness}
        several = shares(loop, play, count, **settings)
        for version in range(start, start + 3):
            batches = [scheduler.next_batch() for scheduler in several]
            for scheduler, batch in zip(several, batches, strict=True):
                scheduler.trained(batch)
                scheduler.published(version + 1)
            trained += [group.position for batch in batches for group in batch]
        frontier = joined([scheduler.trained([]) for scheduler in several], 4)
        for scheduler in several:
            scheduler.close()
    assert len(trained) == len(set(trained)) == 24
    known = {*trained, *frontier.pending, *filter(drop, range(frontier.next))}
    assert known == set(range(frontier.next))
    assert not set(trained) & set(frontier.pending)
