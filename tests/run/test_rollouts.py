"""Rules about the episodes of a batch."""

import numpy as np
import pytest

from open_agentrl_jax.run.rollouts import refuse_failing_code
from open_agentrl_jax.types import Group, Message, Task, Trajectory, UserError


def group(*stops):
    nothing = np.zeros(0, np.int32)
    made = [Trajectory(nothing, nothing.astype(bool), nothing.astype(np.float32), nothing, [], stop) for stop in stops]
    for trajectory in made:
        trajectory.error = "Traceback: ValueError: mine" if trajectory.stop == "error" else ""
    return Group(Task("p", [Message("user", "q")], "1"), made)


def test_exceptions_of_user_code_are_shown_once_and_end_the_run_only_when_they_are_the_rule(caplog):
    groups = [group("error", "answer"), group("error", "aborted")]
    refuse_failing_code(groups, 0.5)
    refuse_failing_code(groups, 0.5)
    assert caplog.text.count("ValueError: mine") == 1
    with pytest.raises(UserError, match=r"3 of 4 episodes ended with an exception .* agent\.max_errors=0\.5"):
        refuse_failing_code([group("error", "answer"), group("error", "error")], 0.5)
