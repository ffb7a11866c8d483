"""What is kept of a teacher's trajectories, and that every one of them is accounted for."""

import collections
import json

from hypothesis import given
from hypothesis import strategies as st

from open_agentrl_jax.agent.python_tool import PythonTool
from open_agentrl_jax.collect.collection import (
    CHECKS,
    Contamination,
    balance,
    messages_of,
    refusal,
    sample_of,
    select,
    table,
    write_card,
)
from open_agentrl_jax.collect.journal import tokenless
from open_agentrl_jax.data.conversations import read_conversations, write_conversations
from open_agentrl_jax.types import Message, Task, ToolCall, Turn

CLEAN = Contamination([])


def played(*turns, stop="answer", accuracy=1.0):
    return tokenless(list(turns), stop, accuracy=accuracy)


def called(code, output, status="ok", words=""):
    call = ToolCall(PythonTool.name, {"code": code})
    text = f'{words}\n<tool_call>\n{{"name": "x", "arguments": {{}}}}\n</tool_call>'
    return Turn(text, [call], [output], [status], words=words)


def task(problem="2 + 2?", source="s", name="1"):
    return Task(f"{source}/{name}", [Message("user", f"Preamble. {problem}")], "4", source, {"problem": problem})


def sample(problem="p", said="4", calls=0, source="s", name="1", number=0):
    turns = [called(f"print({i})", str(i)) for i in range(calls)]
    return sample_of(task(problem, source, name), played(*turns, Turn(said)), number, [PythonTool.schema])


def test_a_conversation_holds_every_call_and_every_result():
    t = played(
        called("print(2+2)", "4", words="First."), called("1/0", "ZeroDivisionError", "error"), Turn("\\boxed{4}")
    )
    assert [(m.role, m.content, len(m.tool_calls)) for m in messages_of(task(), t)] == [
        ("user", "Preamble. 2 + 2?", 0),
        ("assistant", "First.", 1),
        ("tool", "4", 0),
        ("assistant", "", 1),
        ("tool", "ZeroDivisionError", 0),
        ("assistant", "\\boxed{4}", 0),
    ]
    llama = Turn('{"name": "x", "parameters": {}}', [ToolCall("x")], ["4"], ["ok"])  # another family's format
    assert messages_of(task(), played(llama))[1] == Message("assistant", "", [ToolCall("x")])
    s = sample_of(task(), t, 3, [PythonTool.schema])
    assert (s.calls, s.succeeded, s.problem) == (2, 1, "2 + 2?")
    assert s.columns == {"problem_id": "s/1", "try": 3, "tool_calls": 2, "tool_success": 1}


def test_what_speaks_against_a_trajectory_is_named():
    broken = Turn("x", [ToolCall(error="no JSON")], ["Error"], ["error"])
    cases = {
        "": played(Turn("4")),
        "not_graded": played(Turn("4"), stop="aborted"),
        "wrong": played(Turn("5"), accuracy=0.0),
        "unfinished": played(Turn("4 and"), stop="length"),
        "unreadable_call": played(broken, Turn("4")),
        "empty_turn": played(called("1", "1"), Turn("  ")),
    }
    assert {name: refusal(t) for name, t in cases.items()} == {name: name for name in cases}
    assert set(cases) - {""} == {name for name, _ in CHECKS}


LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def test_thirteen_words_in_a_row_are_contamination_and_twelve_are_not():
    found = Contamination([f"Before. {LONG}!", "What is 2 + 2?"])
    w = LONG.split()
    assert found(LONG.upper().replace(" ", ",  ")) and found(" ".join(["x", *w[:13], "y"]))
    assert not found(" ".join(["x", *w[:12], "y"])) and not found("")
    assert found("what is 2+2") and not found("What is 2 + 2? Tell me.")  # a short one must be the same


def test_problem_and_answer_are_both_looked_at():
    found = Contamination([LONG])
    kept, counts = select([sample("clean", "4"), sample(LONG, "5"), sample("other", f"As in {LONG}: 6")], found)
    assert counts == {"duplicate": 0, "contaminated": 2, "over_size": 0, "kept": 1} and kept[0].problem == "clean"


def test_equal_answers_to_equal_problems_are_one():
    rows = [sample("p", "The answer"), sample("p", "the  answer."), sample("q", "The answer"), sample("p", "Another")]
    kept, counts = select(rows, CLEAN)
    assert counts["duplicate"] == 1 and kept == [rows[0], rows[2], rows[3]]
    assert len(select([sample("p", "4", 1), sample("p", "4", 2)], CLEAN)[0]) == 2  # other calls: another trajectory


rows = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), min_size=1, max_size=40)


@given(rows, st.integers(1, 50))
def test_the_balance_is_as_even_as_there_are_enough(cells, size):
    samples = [sample(f"p{i}", calls=calls, source=source) for i, (source, calls) in enumerate(cells)]
    chosen = balance(samples, size)
    assert len(chosen) == min(size, len(samples)) and len({id(s) for s in chosen}) == len(chosen)
    there = collections.Counter(s.conversation.source for s in samples)
    got = collections.Counter(s.conversation.source for s in chosen)
    short = [n for n in there if got[n] < there[n]]  # not all of it was taken: nobody may have much more
    assert all(got[other] <= got[n] + 1 for n in short for other in there)


def test_within_a_source_numbers_of_calls_are_evened_out():
    samples = [sample(f"p{i}", calls=1) for i in range(90)] + [sample(f"q{i}", calls=3) for i in range(6)]
    kept, counts = select(samples, CLEAN, size=20)
    assert [(row["calls"], row["conversations"]) for row in table(kept)] == [(1, 14), (3, 6)]
    assert counts["over_size"] == 76 and kept == select(samples, CLEAN, size=20)[0]


@given(
    st.lists(st.tuples(st.sampled_from(["p", "q", LONG]), st.sampled_from(["4", "5"])), max_size=30), st.integers(0, 9)
)
def test_no_sample_is_lost_unseen(pairs, size):
    samples = [sample(problem, said) for problem, said in pairs]
    kept, counts = select(samples, Contamination([LONG]), size=size)
    assert sum(counts.values()) == len(samples) and counts["kept"] == len(kept)


def test_the_parquet_reads_back_and_the_card_tells_the_counts(tmp_path):
    made = [sample("p", "4 \ud800", 2), sample("q", "5", 0, number=1)]
    write_conversations(tmp_path / "sft.parquet", [s.conversation for s in made], [s.columns for s in made])
    back = read_conversations(tmp_path / "sft.parquet")
    assert [len(c.messages) for c in back] == [6, 2] and back[0].tools == [PythonTool.schema]
    assert back[0].messages[1].tool_calls[0].arguments == {"code": "print(0)"}
    card = {"title": "T", "made": {"style": "a|b"}, "kept": table(made), "none": []}
    write_card(tmp_path, card)
    assert json.loads((tmp_path / "card.json").read_text())["kept"][1]["succeeded"] == 1.0
    text = (tmp_path / "README.md").read_text()
    assert "| s | 0 | 1 | 1 | - |" in text and "a\\|b" in text and "## none" not in text
