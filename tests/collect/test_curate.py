"""launch.curate without a model: when rollouts stop, what is kept, and what the card says where nothing is."""

import asyncio
import json
from xml.etree import ElementTree

import pytest

from launch import curate
from open_agentrl_jax.collect.journal import tokenless
from open_agentrl_jax.data import synthetic
from open_agentrl_jax.data.prompts import read_tasks
from open_agentrl_jax.data.rows import read_table
from open_agentrl_jax.types import UserError

TASK = synthetic.problems(0, 1)[0]


def rate(outcomes, tries=8):
    """The counts of one problem whose i-th rollout is right (True), wrong (False) or always lost (None)."""
    played = []

    async def play(task, *, position, sample, attempt):
        played.append((sample, attempt))
        good = outcomes[sample]
        return tokenless([], "aborted" if good is None else "answer", accuracy=float(bool(good)))

    result = asyncio.run(curate.rate(play, TASK, 0, tries, asyncio.Semaphore(4), lambda: None))
    return result, played


@pytest.mark.parametrize(
    ("outcomes", "result"),
    [
        ([True, False] * 4, (3, 3, 0)),  # medium whatever the last two say
        ([True] * 8, (8, 0, 0)),  # only the eighth tells easy from solved
        ([False] * 8, (0, 8, 0)),
        ([False] * 6 + [True] * 2, (1, 6, 0)),  # hard whatever the last one says
        ([True] * 6 + [False] * 2, (6, 1, 0)),
    ],
)
def test_rollouts_stop_when_they_can_change_nothing(outcomes, result):
    counts, played = rate(outcomes)
    assert counts == result and len(played) == sum(result) == len(set(played))


def test_what_the_infrastructure_lost_is_no_try():
    counts, played = rate([None, True, None, False, True, False, True, False])
    assert counts == (2, 2, 2)  # of the six that can still be known: medium, whatever the last two say
    assert sum(sample == 0 for sample, _ in played) == 3  # played again before it is given up
    assert rate([None] * 8)[0] == (0, 0, 8)


def test_targets():
    assert curate.parse_target("flat") is None
    assert curate.parse_target("hard=2, easy=1") == {"hard": 2.0, "easy": 1.0}
    with pytest.raises(UserError, match="--target=round: write flat, or shares"):
        curate.parse_target("round")


def write(output, outcomes, target=None):
    tasks = synthetic.problems(0, len(outcomes))
    card = {"counts": {"problems": len(tasks)}}
    curate.write(output, list(zip(tasks, outcomes, strict=True)), card, target)
    return tasks


OUTCOMES = [(0, 8, 0)] * 5 + [(1, 6, 1)] * 4 + [(3, 3, 0)] * 2 + [(7, 1, 0)] * 6 + [(8, 0, 0)] * 3 + [(0, 0, 8)]


def test_the_set_the_card_and_the_picture(tmp_path):
    tasks = write(tmp_path, OUTCOMES)
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["counts"] == {"problems": 21, "kept": 6}
    assert card["difficulty"] == [
        {"class": "unsolved", "before": 5, "after": 0},
        {"class": "hard", "before": 4, "after": 2},
        {"class": "medium", "before": 2, "after": 2},
        {"class": "easy", "before": 6, "after": 2},
        {"class": "solved", "before": 3, "after": 0},
    ]
    kept = read_tasks(tmp_path / "rl.parquet")
    prompts = {t.messages[0].content: t.answer for t in tasks}
    assert len(kept) == 6 and all(prompts[t.messages[0].content] == t.answer for t in kept)
    rates = read_table(
        tmp_path / "rl.parquet", lambda row, file, i: (row["difficulty"], row["pass_rate"], row["tries"])
    )
    assert sorted(rates) == [("easy", 0.875, 8)] * 2 + [("hard", 1 / 7, 7)] * 2 + [("medium", 0.5, 6)] * 2
    assert [t.extra["pass_rate"] for t in kept] == [r for _, r, _ in rates]
    assert ElementTree.parse(tmp_path / "difficulty.svg").getroot().tag.endswith("svg")
    readme = (tmp_path / "README.md").read_text()
    assert "| easy | 6 | 2 |" in readme and "![difficulty](difficulty.svg)" in readme


def test_a_given_histogram(tmp_path):
    write(tmp_path, OUTCOMES, {"hard": 1.0, "easy": 2.0})
    after = {r["class"]: r["after"] for r in json.loads((tmp_path / "card.json").read_text())["difficulty"]}
    assert after == {"unsolved": 0, "hard": 3, "medium": 0, "easy": 6, "solved": 0}


def test_where_nothing_can_be_learned_the_card_says_so(tmp_path):
    with pytest.raises(UserError, match=r"card\.json: no problem has a pass rate between 0 and 1"):
        write(tmp_path, [(0, 8, 0), (8, 0, 0)])
    assert json.loads((tmp_path / "card.json").read_text())["counts"]["kept"] == 0
    assert not (tmp_path / "rl.parquet").exists()
