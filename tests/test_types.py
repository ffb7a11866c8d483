"""Episodes of several token sequences: one reward and advantage, each sampled token trained once."""

import dataclasses
import json

import numpy as np

from open_agentrl_jax.algorithms.advantages import group_relative, turn_relative
from open_agentrl_jax.config import RL, Loss, Packing
from open_agentrl_jax.telemetry.metrics import episode_table, rollout_metrics
from open_agentrl_jax.telemetry.tokens import unpack_tokens
from open_agentrl_jax.telemetry.writer import Writer
from open_agentrl_jax.train.learner import Learner, turn_advantages
from open_agentrl_jax.train.shares import Rows
from open_agentrl_jax.types import Episode, Group, TokenSequence
from tests.telemetry.runs import group

STREAMS = [field.name for field in dataclasses.fields(TokenSequence)]


def as_episode(trajectory, *forks):
    """An Episode with the outcome of a trajectory; at each fork a new sequence repeats the tokens, unmasked."""
    outcome = {f.name: getattr(trajectory, f.name) for f in dataclasses.fields(Episode) if f.name != "sequences"}
    parts = [TokenSequence(*(getattr(trajectory, name) for name in STREAMS))]
    for fork in forks:
        parts[-1] = TokenSequence(*(getattr(parts[-1], name)[:fork] for name in STREAMS[:-1]), turns=trajectory.turns)
        late = np.arange(len(trajectory.tokens)) >= fork
        mask = trajectory.loss_mask & late
        logprobs, versions = np.where(mask, trajectory.logprobs, 0), np.where(mask, trajectory.versions, -1)
        parts.append(TokenSequence(trajectory.tokens, mask, logprobs, versions, turns=[]))
    return Episode(sequences=parts, **outcome)


def packed(made, samples=3):
    rl = RL(prompts=1, samples=samples, mini_batches=1)
    learner = Learner(
        None,
        None,
        None,
        lambda batch: batch,
        group_relative,
        rl,
        Packing(rows=1, length=12),
        np.ones(1),
        [range(1)],
        Rows((0,), (1,)),
    )
    ((batch, used),), _ = learner.pack([made])
    return batch, used


def test_one_sequence_gives_the_bits_of_a_trajectory():
    plain = group("p", (1.0, -1.0, 1.0))
    wrapped = Group(plain.task, [as_episode(t) for t in plain.trajectories])
    (one, used), (other, as_used) = packed(plain), packed(wrapped)
    assert used == as_used
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
    with_prompt = [dataclasses.replace(t, metrics=t.metrics | {"prompt_length": 4.0}) for t in plain.trajectories]
    plain = Group(plain.task, with_prompt)
    wrapped = Group(plain.task, [as_episode(t) for t in with_prompt])
    one, other = (rollout_metrics(episode_table([made], version=2)) for made in (plain, wrapped))
    assert one == other and one["staleness/max"] >= 0


def test_sequences_share_the_advantage_and_every_sampled_token_trains_once():
    plain = group("p", (1.0, -1.0, 1.0))
    cut = Group(plain.task, [as_episode(plain.trajectories[0], 7), *plain.trajectories[1:]])
    batch, used = packed(cut)
    assert used == 4 and batch.mask.shape == (6, 1, 12)  # more sequences than samples: a multiple of the static shape
    whole, _ = packed(plain)
    assert batch.mask.sum() == whole.mask.sum()
    np.testing.assert_array_equal(np.unique(batch.advantages), np.unique(whole.advantages))
    np.testing.assert_allclose(batch.advantages.sum(), whole.advantages.sum(), rtol=1e-6)


def test_each_source_has_metrics_of_its_own():
    groups = [group("p", (1.0, -1.0)), group("q", (1.0, 1.0)), group("r", (-1.0, -1.0))]
    for made, name in zip(groups, ("easy", "easy", "hard"), strict=True):
        made.task.extra["row_name"] = name
    numbers = rollout_metrics(episode_table(groups))
    assert (numbers["easy/accuracy/mean"], numbers["hard/accuracy/mean"]) == (0.75, 0.0)
    assert (numbers["easy/episodes"], numbers["hard/num_turns/mean"]) == (4.0, 2.0)
    assert not [name for name in rollout_metrics(episode_table([group("p", (1.0,))])) if name.startswith("easy")]


def test_turn_credit_adds_the_advantage_of_each_turn_within_its_group():
    made = group("p", (1.0, -1.0, 1.0))
    for trajectory, reward in zip(made.trajectories, (0.0, 3.0, 0.0), strict=True):
        trajectory.turns[0].reward = reward
    advantages = np.array([0.5, -1.0, 0.5])
    expected = turn_relative(np.array([[0.0], [3.0], [0.0]]), np.ones((3, 1), bool))[:, 0]
    found = list(turn_advantages(made, advantages, np.ones(3, bool), Loss(turn_credit=2.0)))
    for (sequence, tokens), whole, own in zip(found, advantages, expected, strict=True):
        first, second = tokens[4:7], tokens[9:]  # the mask leaves out the prompt and the tool's tokens
        assert sequence.loss_mask[4:7].all() and not sequence.loss_mask[7:9].any()
        np.testing.assert_allclose(first, whole + 2 * own, rtol=1e-6)
        np.testing.assert_allclose(second, whole, rtol=1e-6)
    forked = Group(made.task, [as_episode(t, 7) for t in made.trajectories])
    again = list(turn_advantages(forked, advantages, np.ones(3, bool), Loss(turn_credit=2.0)))
    np.testing.assert_allclose(again[0][1][4:7], found[0][1][4:7])
    np.testing.assert_allclose(again[1][1][9:], advantages[0])


def test_a_line_of_trajectories_jsonl_holds_every_sequence(tmp_path):
    plain = group("p", (1.0,))
    writer = Writer(tmp_path)
    writer.trajectories(1, "rl", [Group(plain.task, [as_episode(plain.trajectories[0], 7)])])
    writer.close()
    line = json.loads((tmp_path / "trajectories.jsonl").read_text())
    parts = [unpack_tokens(part)[0] for part in (line["tokens"], *line["more_tokens"])]
    np.testing.assert_array_equal(parts[0], plain.trajectories[0].tokens[:7])
    np.testing.assert_array_equal(parts[1], plain.trajectories[0].tokens)
    assert line["versions"] == [1] and [m["role"] for m in line["messages"]] == ["assistant", "tool", "assistant"]
