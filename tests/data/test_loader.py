import collections

import pytest

from open_agentrl_jax.data.loader import Subset, read_mixture, task_stream
from open_agentrl_jax.types import UserError

LETTERS = list("abcdefghijk")


def take(stream, n, start=0):
    return [stream[i] for i in range(start, start + n)]


def test_an_epoch_holds_every_element_once_and_no_two_epochs_are_alike():
    stream = task_stream(LETTERS, seed=3)
    epochs = [take(stream, 11, 11 * e) for e in range(20)]
    assert all(sorted(e) == LETTERS for e in epochs)
    assert len({tuple(e) for e in epochs}) == 20


def test_a_position_says_all_there_is_to_resume():
    whole = take(task_stream(LETTERS, seed=3), 100)
    assert take(task_stream(LETTERS, seed=3), 40, start=60) == whole[60:]
    backwards = task_stream(LETTERS, seed=3)
    assert [backwards[i] for i in reversed(range(100))] == whole[::-1]
    assert task_stream(LETTERS, seed=3)[10**15] in LETTERS


def test_the_seed_decides_the_order():
    assert take(task_stream(LETTERS, seed=3), 50) != take(task_stream(LETTERS, seed=4), 50)
    assert take(task_stream(LETTERS, seed=3, shuffle=False), 22) == LETTERS * 2


def test_processes_share_the_stream():
    whole = take(task_stream(LETTERS, seed=3), 60)
    shards = [take(task_stream(LETTERS, seed=3, process_index=i, process_count=3), 20) for i in range(3)]
    assert [shards[i % 3][i // 3] for i in range(60)] == whole


def test_sources_are_mixed_by_weight_each_at_its_own_pace():
    small, large = list("xyz"), [str(i) for i in range(100)]
    stream = task_stream([small, large], seed=3, weights=[1, 3])
    seen = take(stream, 400)
    assert sum(s in small for s in seen) == 100
    assert collections.Counter(s for s in seen if s not in small) == dict.fromkeys(large, 3)
    assert all(18 <= sum(s in small for s in seen[i : i + 80]) <= 22 for i in range(0, 320, 10))
    whole = [take(task_stream([small, large], 3, weights=[1, 3], process_index=i, process_count=2), 50) for i in (0, 1)]
    assert [whole[i % 2][i // 2] for i in range(100)] == seen[:100]


def test_a_field_names_one_source_or_several_with_weights():
    files = {"a.parquet": LETTERS, "gs://b/c.jsonl": [1, 2], "gsm8k=d.jsonl": [3]}
    one = read_mixture("data.train", "a.parquet", files.get)
    assert list(one) == LETTERS and len(one) == 11
    assert take(task_stream(one.sources, 3, weights=one.weights), 60) == take(task_stream(LETTERS, seed=3), 60)
    several = read_mixture("data.train", "gs://b/c.jsonl:1, a.parquet:0.5,gsm8k=d.jsonl:2.5", files.get)
    assert several.weights == [1, 0.5, 2.5] and list(several) == [1, 2, *LETTERS, 3]
    assert read_mixture("data.train", "a.parquet,gs://b/c.jsonl", files.get).weights == [11, 2]
    for text in ("a.parquet:2,gs://b/c.jsonl", "a.parquet:0", "a.parquet:1,,gs://b/c.jsonl:1"):
        with pytest.raises(UserError, match=r"data\.train=.*positive weight"):
            read_mixture("data.train", text, files.get)


def test_a_subset_copies_nothing():
    subset = Subset(range(100, 200), [3, 1])
    assert list(subset) == [103, 101] and subset[1] == 101 and len(subset) == 2


def test_mistakes_of_the_user():
    with pytest.raises(UserError, match="empty"):
        task_stream([], seed=0)
    with pytest.raises(UserError, match="source 1 is empty"):
        task_stream([LETTERS, []], seed=0, weights=[1, 1])
    for weights in ([1], [1, 0], [1, 2, 3]):
        with pytest.raises(UserError, match="weights"):
            task_stream([LETTERS, LETTERS], seed=0, weights=weights)
    with pytest.raises(UserError, match="process_index"):
        task_stream(LETTERS, seed=0, process_index=2, process_count=2)
