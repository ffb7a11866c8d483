import dataclasses
import signal
import types

import jax.numpy as jnp
import numpy as np
import pytest

from open_agentrl_jax.config import RL, Loss, Packing
from open_agentrl_jax.reference.behaviour import REFERENCE, ROBUST
from open_agentrl_jax.train.checkpoint import Progress
from open_agentrl_jax.train.learner import Learner
from open_agentrl_jax.train.loop import HeldOut, train_rl, warn_of_drift
from open_agentrl_jax.train.progress import Interrupted, Run, Stopper
from open_agentrl_jax.train.shares import Rows
from open_agentrl_jax.types import Group, Message, NothingToLearn, Task, Trajectory, UserError


def group(*rewards):
    def one(reward):
        stop = "aborted" if reward is None else "answer"
        tokens = np.arange(4, dtype=np.int32)
        mask = tokens > 1
        return Trajectory(tokens, mask, np.zeros(4, np.float32), np.where(mask, 0, -1), [], stop, reward or 0.0)

    return Group(Task("p", [Message("user", "q")], "1"), [one(r) for r in rewards])


def learner(behaviour=ROBUST, samples=3, prompts=2, step=None, **loss):
    rl = RL(prompts=prompts, samples=samples, mini_batches=1, loss=Loss(old_logprobs="rollout", **loss))
    packing = Packing(rows=1, length=8)
    return Learner(
        types.SimpleNamespace(params=None),
        step,
        None,
        lambda batch: batch,
        behaviour.advantages,
        rl,
        packing,
        np.ones(99),
        [range(prompts)],
        Rows((0,), (1,)),
    )


def advantages_of(batches):
    ((batch, _),) = batches
    return sorted({round(float(x), 3) for x in batch.advantages[batch.mask]})


def test_lost_episodes_do_not_train_and_do_not_move_the_mean():
    batches, _ = learner().pack([group(1.0, -1.0, None), group(0.0, 0.0, 0.0)])
    assert advantages_of(batches) == [-0.707, 0.0, 0.707]
    assert int(batches[0][0].mask.sum()) == 5 * 2


def test_overlong_episodes_are_masked_on_request():
    groups = [group(1.0, -1.0, -1.9), group(0.0, 0.0, 0.0)]
    groups[0].trajectories[2].stop = "length"
    punishing, masking = learner(), learner()
    masking.rl = dataclasses.replace(masking.rl, mask_overlong=True)
    assert min(advantages_of(punishing.pack(groups)[0])) < -0.8
    batches, _ = masking.pack(groups)
    assert advantages_of(batches) == [-0.707, 0.0, 0.707]
    assert int(batches[0][0].mask.sum()) == 5 * 2


def test_the_residue_of_the_reference_is_reproduced_on_request():
    groups = [group(*[-0.9] * 16)]
    assert advantages_of(learner(samples=16, prompts=1).pack(groups)[0]) == [0.0]
    assert max(map(abs, advantages_of(learner(REFERENCE, samples=16, prompts=1).pack(groups)[0]))) > 0.05


def test_drifting_log_probs_are_logged(caplog):
    warn_of_drift(3, {"rollout/logprob_difference": 0.05}, 0.1)
    assert not caplog.text
    warn_of_drift(4, {"rollout/logprob_difference": 0.25}, 0.1)
    assert "step 4: the engine's log-probs differ" in caplog.text and "rl.logprob_tolerance=0.1" in caplog.text
    warn_of_drift(5, {"rollout/logprob_difference": float("nan")}, 0.1)
    assert "step 5" in caplog.text


class Batches:
    """Rollouts that give the same groups again and again, `count` times."""

    def __init__(self, groups, count=99):
        self.groups, self.count = groups, count

    def next_batch(self, check):
        self.count -= 1
        if self.count < 0:
            raise NothingToLearn("all accuracies are equal")
        return self.groups

    def trained(self, groups):
        return Progress("rl", 0)

    def published(self, version):
        pass


class Files:
    """A writer and checkpoints that keep what they get."""

    def __init__(self):
        self.lines, self.saved = [], []

    def metrics(self, step, phase, numbers):
        self.lines.append(numbers)

    def trajectories(self, *_):
        pass

    def offsets(self):
        return {}

    def wait(self):
        pass

    def save(self, state, progress, **_):
        self.saved.append(progress.step)


def metrics(tokens=4.0, norm=1.0, difference=0.0):
    numbers = {"actor/tokens": tokens, "actor/grad_norm": norm, "rollout/logprob_difference": difference}
    return {name: jnp.asarray(value) for name, value in numbers.items()}


def train(groups, step, steps=9, count=99):
    for each in groups:
        for trajectory in each.trajectories:
            trajectory.metrics |= dict.fromkeys(("response_length", "tool_calls", "tool_success"), 1.0)
            trajectory.metrics |= dict.fromkeys(("prompt_length", "num_turns"), 1.0)
    files = Files()
    run = Run(files, files, Stopper(), 1000, lambda *_: None, lambda: None)
    held_out = HeldOut(None, 0, steps, -1.0, 0)
    try:
        batches = Batches(groups, count)
        settings = {"steps": steps, "start": Progress("rl", 0), "engine_metrics": dict}
        train_rl(learner(step=step), batches, lambda *_: None, held_out, run, **settings)
    finally:
        train.files = files
    return files


def test_the_first_ctrl_c_asks_and_the_second_stops(capfd):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stopper = Stopper()
        stopper.install()
        signal.raise_signal(signal.SIGINT)
        stopper.agree()
        assert stopper.asked and "press Ctrl-C again" in capfd.readouterr().err
        with pytest.raises(Interrupted):
            stopper.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


LOST, PLAYED = [group(None, None, None)] * 2, [group(1.0, -1.0, 0.0)] * 2


@pytest.mark.parametrize(
    ("groups", "norm", "reason"),
    [
        (LOST, 1.0, "steps 1 to 3 trained no token: 6 of 6 episodes were aborted"),
        (PLAYED, np.nan, "steps 1 to 3 trained no token: all updates were skipped, because their gradient norm is nan"),
    ],
)
def test_a_run_that_trains_no_token_ends_with_the_reason(groups, norm, reason, caplog):
    with pytest.raises(UserError, match=reason):
        train(groups, lambda state, batch, used: (state, metrics(norm=norm)))
    assert len(train.files.lines) == 3 and train.files.saved == [3]
    assert "step 1 trained no token" in caplog.text


def test_one_step_without_a_token_is_forgiven():
    norms = iter([np.nan, np.nan, 1.0] * 3)
    files = train(PLAYED, lambda state, batch, used: (state, metrics(norm=next(norms))))
    assert len(files.lines) == 9


def test_rl_ends_early_and_saves_when_nothing_is_left_to_learn(caplog):
    files = train(PLAYED, lambda state, batch, used: (state, metrics()), count=4)
    assert len(files.lines) == 4 and files.saved == [4]
    assert "RL ends after step 4 of 9: all accuracies are equal" in caplog.text


def test_drift_is_measured_with_the_weights_that_sampled():
    """Later mini-batches of a step are computed with updated weights."""
    learning = learner(step=None)
    learning.rl = dataclasses.replace(learning.rl, mini_batches=2)
    differences = iter([0.25, 9.0])
    learning.step = lambda state, batch, used: (state, metrics(difference=next(differences)))
    assert learning.update([(None, 1)] * 2)["rollout/logprob_difference"] == 0.25
