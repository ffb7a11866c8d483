import numpy as np

from open_agentrl_jax.behaviour import REFERENCE, ROBUST
from open_agentrl_jax.train.loop import advantages, examples, warn_of_drift
from open_agentrl_jax.types import Group, Message, Task, Trajectory


def group(*rewards):
    def one(reward):
        stop = "aborted" if reward is None else "answer"
        tokens = np.arange(4, dtype=np.int32)
        mask = tokens > 1
        return Trajectory(tokens, mask, np.zeros(4, np.float32), np.where(mask, 0, -1), [], stop, reward or 0.0)

    return Group(Task("p", [Message("user", "q")], "1"), [one(r) for r in rewards])


def test_lost_episodes_do_not_train_and_do_not_move_the_mean():
    groups = [group(1.0, -1.0, None), group(0.0, 0.0, 0.0)]
    rows = advantages(groups, normalize_std=True, behaviour=ROBUST)
    np.testing.assert_allclose(rows, [[0.5**0.5, -(0.5**0.5), 0], [0, 0, 0]], rtol=1e-5)
    assert [round(e.advantage, 3) for e in examples(groups, rows)] == [0.707, -0.707, 0, 0, 0]


def test_the_residue_of_the_reference_is_reproduced_when_asked_for():
    groups = [group(*[-0.9] * 16)]
    assert (advantages(groups, normalize_std=True, behaviour=ROBUST) == 0).all()
    assert np.abs(advantages(groups, normalize_std=True, behaviour=REFERENCE)).max() > 0.05


def test_log_probs_that_drift_apart_are_told(caplog):
    warn_of_drift(3, {"rollout/logprob_difference": 0.05}, 0.1)
    assert not caplog.text
    warn_of_drift(4, {"rollout/logprob_difference": 0.25}, 0.1)
    warn_of_drift(5, {"rollout/logprob_difference": float("nan")}, 0.1)
    assert "step 5" in caplog.text
    assert "step 4: the engine's log-probs are 0.250 nats" in caplog.text and "rl.logprob_tolerance=0.1" in caplog.text
