"""The policy in training: packs groups into mini-batches, adds the log-probs they need, applies the updates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from open_agentrl_jax.algorithms.advantages import turn_relative
from open_agentrl_jax.config import RL, Loss, Packing
from open_agentrl_jax.train.packing import Batch, Example
from open_agentrl_jax.train.shares import Rows, micro_batches_of, pack_share
from open_agentrl_jax.train.state import TrainState
from open_agentrl_jax.types import Group, TokenSequence

MiniBatch = tuple[Batch, np.int32]  # on the mesh, with its number of occupied micro-batches


def examples(groups: Sequence[Group], advantages: np.ndarray, valid: np.ndarray, loss: Loss) -> list[Example]:
    """The sequences of a batch that train. The sequences of an episode share its advantage.

    With `turn_credit`, each turn has an advantage of its own besides.

    Args:
        groups: g groups of n samples.
        advantages: [g n].
        valid: [g n]; False for episodes that do not train.
        loss: its `turn_credit` and `normalize_std`.
    """
    if loss.turn_credit:
        return [
            Example(sequence.tokens, sequence.loss_mask, per_token, sequence.logprobs)
            for group, row, trained in zip(groups, advantages, valid, strict=True)
            for sequence, per_token in turn_advantages(group, row, trained, loss)
        ]
    return [
        Example(sequence.tokens, sequence.loss_mask, float(a), sequence.logprobs)
        for group, row, trains in zip(groups, advantages, valid, strict=True)
        for t, a, train in zip(group.trajectories, row, trains, strict=True)
        for sequence in t.sequences
        if train and sequence.loss_mask.any()
    ]


def turn_advantages(
    group: Group, advantages: np.ndarray, valid: np.ndarray, loss: Loss
) -> Iterator[tuple[TokenSequence, np.ndarray]]:
    """The trained sequences of a group, each with the advantages of its tokens: the episode's and the turn's.

    The turns of a sequence are the runs of its loss mask: the template puts a token between any two.
    """
    turns = [t.turns if trained else [] for t, trained in zip(group.trajectories, valid, strict=True)]
    shape = len(turns), max(1, *map(len, turns))
    rewards, present = np.zeros(shape, np.float32), np.zeros(shape, bool)
    for i, row in enumerate(turns):
        rewards[i, : len(row)], present[i, : len(row)] = [turn.reward for turn in row], True
    own = turn_relative(rewards, present, normalize_std=loss.normalize_std)
    for t, trained, advantage, row in zip(group.trajectories, valid, advantages, own, strict=True):
        first = 0
        for sequence in t.sequences if trained else ():
            begins = np.diff(sequence.loss_mask.astype(int), prepend=0) == 1
            number = np.clip(first + np.cumsum(begins) - 1, 0, shape[1] - 1)
            first += len(sequence.turns)
            if sequence.loss_mask.any():
                yield sequence, (advantage + loss.turn_credit * row[number]).astype(np.float32)


@dataclasses.dataclass
class Learner:
    """The training state and the functions that change it."""

    state: TrainState
    step: Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, Any]]]  # see train.step.make_step
    score: Callable[[Any, Batch, Any], Any]  # see train.step.make_score
    place: Callable[[Batch], Batch]  # onto the mesh
    advantages: Callable[..., np.ndarray]  # see algorithms.advantages.group_relative
    rl: RL
    packing: Packing
    rates: np.ndarray  # learning rate of every update
    places: Sequence[Sequence[int]]  # of each process's groups in a batch; see rollout.scheduler.Share
    rows: Rows  # of a micro-batch that each process packs
    reference: Any = None  # parameters of the reference policy, if the loss has a KL term
    idle: int = 0  # steps in a row in which no token was trained

    def pack(self, groups: Sequence[Group]) -> tuple[list[MiniBatch], float]:
        """The mini-batches of a step that hold a token, and the share of their places that is occupied.

        Args:
            groups: those of this process, in the order of its places in the batch.
        """
        shape = (len(groups), self.rl.samples)
        rewards = np.array([t.reward for group in groups for t in group.trajectories], np.float32).reshape(shape)
        cut = [self.rl.mask_overlong and t.stop == "length" for group in groups for t in group.trajectories]
        aborted = [t.aborted for group in groups for t in group.trajectories]
        valid = ~np.logical_or(cut, aborted).reshape(shape)
        rows = self.advantages(rewards, normalize_std=self.rl.loss.normalize_std, valid=valid)
        count = self.rl.mini_batches
        numbers = [[place * count // self.rl.prompts for place in places] for places in self.places]
        sequences = [max(part.count(n) for n in range(count)) * self.rl.samples for part in numbers]
        micro_batches, mine = micro_batches_of(sequences, self.rows), numbers[jax.process_index()]
        packed = []
        for number in range(count):
            part = [i for i, n in enumerate(mine) if n == number]
            made = examples([groups[i] for i in part], rows[part], valid[part], self.rl.loss)
            packed.append(pack_share(made, self.packing, self.rows, micro_batches=micro_batches))
        useful = float(np.mean([share for *_, share in packed]))
        return [(self.place(batch), np.int32(used)) for batch, used, _ in packed if used], useful

    def with_logprobs(self, batches: Sequence[MiniBatch]) -> list[MiniBatch]:
        """Adds the trainer's own log-probs, and those of the reference policy, where the loss uses them."""
        sources = {}
        if self.rl.loss.old_logprobs == "trainer":
            sources["old_logprobs"] = self.state.params
        if self.rl.loss.kl_coef > 0:
            sources["ref_logprobs"] = self.reference
        made = list(batches)
        for name, params in sources.items():
            made = [(dataclasses.replace(b, **{name: self.score(params, b, used)}), used) for b, used in made]
        return made

    def update(self, batches: Sequence[MiniBatch]) -> dict[str, float]:
        """One optimizer update per mini-batch; returns their mean metrics once the device is done."""
        metrics = []
        for batch, used in batches:
            self.state, each = self.step(self.state, batch, used)
            metrics.append(each)
        updates = [{name: float(value) for name, value in each.items()} for each in metrics]
        numbers = {name: float(np.mean([each[name] for each in updates])) for name in (updates or [{}])[0]}
        if updates and self.rl.loss.old_logprobs == "rollout":
            # The first update alone was computed with the weights that the batch was sampled from.
            numbers["rollout/logprob_difference"] = updates[0]["rollout/logprob_difference"]
        numbers["actor/tokens"] = sum(each["actor/tokens"] for each in updates)
        trained = any(each["actor/tokens"] > 0 and math.isfinite(each["actor/grad_norm"]) for each in updates)
        self.idle = 0 if trained else self.idle + 1
        return numbers
