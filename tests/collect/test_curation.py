import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_agentrl_jax.collect.curation import (
    CLASSES,
    KEPT,
    PassRate,
    bin_of,
    classify,
    decided,
    histogram,
    report,
    resample,
    undecided,
)
from open_agentrl_jax.collect.picture import bars
from open_agentrl_jax.types import UserError


def test_classes_at_their_borders():
    names = [classify(PassRate(r, 8)) for r in range(9)]
    assert names == ["unsolved", "hard", "hard", "medium", "medium", "medium", "easy", "easy", "solved"]
    assert classify(PassRate(1, 1)) == "solved" and classify(PassRate(0, 1)) == "unsolved"


@pytest.mark.parametrize(("right", "tries"), [(1, 0), (0, 0), (3, 2), (-1, 2)])
def test_what_is_no_pass_rate(right, tries):
    with pytest.raises(ValueError, match="no pass rate"):
        PassRate(right, tries)


@given(st.integers(0, 8), st.data())
def test_decided_means_that_no_further_rollout_changes_the_class(right, data):
    wrong = data.draw(st.integers(0, 8 - right))
    ends = {classify(PassRate(right + more, 8)) for more in range(8 - right - wrong + 1)}
    assert decided(right, wrong, 8) == (len(ends) == 1)


def test_rollouts_saved_by_deciding_early():
    assert decided(3, 3, 8) and not decided(2, 3, 8) and not decided(0, 7, 8) and decided(0, 8, 8) and decided(1, 6, 8)


def test_histograms_count_exactly():
    rates = [PassRate(r, 8) for r in range(9)]
    assert histogram(rates, 8) == [1, 1, 1, 1, 1, 1, 1, 1, 0, 1]
    assert histogram(rates) == [1, 2, 2, 2, 1, 1]
    assert bin_of(PassRate(1, 3), 3) == 1 and bin_of(PassRate(2, 3), 3) == 2


rates = st.lists(st.integers(0, 8).map(lambda r: PassRate(r, 8)), min_size=1, max_size=60)


@given(rates, st.integers(0, 3), st.none() | st.integers(0, 80))
def test_resampling_takes_none_twice_and_none_without_signal(rates, seed, size):
    if not any(0 < r.right < r.tries for r in rates):
        with pytest.raises(UserError, match="no problem"):
            resample(rates, seed=seed)
        return
    chosen = resample(rates, size=size, seed=seed)
    assert chosen == sorted(set(chosen)) == resample(rates, size=size, seed=seed)
    assert all(0 < rates[i].right < rates[i].tries for i in chosen)
    if size is not None:
        assert len(chosen) == min(size, sum(classify(r) in KEPT for r in rates))


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)
)
def test_the_histogram_follows_the_target(hard, medium, easy, a, b, c):
    counts = {"hard": hard, "medium": medium, "easy": easy}
    rates = [PassRate({"hard": 1, "medium": 4, "easy": 7}[n], 8) for n, k in counts.items() for _ in range(k)]
    rates += [PassRate(0, 8), PassRate(8, 8)]
    target = {"hard": a, "medium": b, "easy": c}
    chosen = collections.Counter(classify(rates[i]) for i in resample(rates, target))
    size = sum(chosen.values())
    for name, share in target.items():
        assert abs(chosen[name] - size * share / (a + b + c)) < 1.5
    assert any(counts[n] < (size + 3) * s / (a + b + c) + 1 for n, s in target.items()), "it takes all it can"


def test_flat_by_default_given_by_wish_and_filled_up_where_scarce():
    rates = [PassRate(1, 8)] * 10 + [PassRate(4, 8)] * 20 + [PassRate(7, 8)] * 30 + [PassRate(0, 8)] * 40
    count = lambda chosen: collections.Counter(classify(rates[i]) for i in chosen)  # noqa: E731
    assert count(resample(rates)) == {"hard": 10, "medium": 10, "easy": 10}
    assert count(resample(rates, {"easy": 1})) == {"easy": 30}
    assert count(resample(rates, {"hard": 1, "medium": 1}, size=24)) == {"hard": 10, "medium": 14}
    assert count(resample(rates, size=1000)) == {"hard": 10, "medium": 20, "easy": 30}
    assert resample(rates, size=12, seed=1) != resample(rates, size=12, seed=2)
    assert collections.Counter(bin_of(rates[i], 4) for i in resample(rates, by=bin_of)) == {1: 10, 2: 10, 4: 10}


def test_mistakes_of_the_user():
    rates = [PassRate(4, 8)]
    for target in ({"meduim": 1.0}, {"hard": -1.0, "medium": 2.0}, {"medium": 0.0}, {}):
        with pytest.raises(UserError, match="target histogram"):
            resample(rates, target)
    with pytest.raises(UserError, match="no problem"):
        resample([PassRate(0, 8), PassRate(8, 8)])


def test_the_report_counts_before_and_after():
    rows = report([PassRate(0, 8), PassRate(4, 8), PassRate(4, 8)], [PassRate(4, 8)])
    assert [r["class"] for r in rows] == list(CLASSES)
    assert rows[0] == {"class": "unsolved", "before": 1, "after": 0}
    assert rows[2] == {"class": "medium", "before": 2, "after": 1}


def test_rollouts_are_made_side_by_side_as_long_as_they_are_needed():
    assert undecided(0, 0, 8) == 6  # three right and three wrong: medium, whatever follows
    assert undecided(3, 3, 8) == 0 and undecided(0, 8, 8) == 0 and undecided(0, 6, 8) == 1 and undecided(1, 5, 8) == 1
    for right in range(9):
        for wrong in range(9 - right):
            more = undecided(right, wrong, 8)
            assert (more == 0) == decided(right, wrong, 8)
            assert more <= 8 - right - wrong


def test_the_picture_is_a_drawing_with_every_number():
    from xml.etree import ElementTree

    drawn = ElementTree.fromstring(bars("a < b", ["hard", "easy"], {"before": [3, 40], "after": [3, 0]}))
    texts = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert texts[0] == "a < b" and {"before (43)", "after (3)", "hard", "easy", "40", "0"} <= set(texts)
    heights = [float(e.get("height")) for e in drawn.iter() if e.tag.endswith("rect") and e.get("y") != "28"][1:]
    assert heights[0] == heights[2] > 0 and heights[1] == max(heights) and heights[3] == 0
    assert ElementTree.fromstring(bars("", [], {})) is not None
