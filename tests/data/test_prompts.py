"""Every format of RECIPE.md 7, read row by row, and what may never enter a prompt (faults 8 and 16)."""

import base64
import json
import os
import pickle
import zlib
from pathlib import Path

import pytest

from open_agentrl_jax.data.prompts import FORMATS, TEMPLATES, TOOL_HINT, family, read_tasks, write_tasks
from open_agentrl_jax.data.rows import write_parquet
from open_agentrl_jax.types import UserError

GSM8K = {"question": "Ann has 3 pens and buys 4. How many has she?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}
AIME = {"id": 60, "problem": "Find the number of x.", "solution": "long", "answer": "204", "url": "u"}
AIME_UPPER = {"ID": "2024-I-1", "Problem": "Find the sum of y.", "Answer": 25.0}
GPQA = {"problem": "Which?\nA) one\nB) two\nC) three\nD) four", "solution": "So \\boxed{C}", "domain": "Physics"}
GPQA_RAW = {
    "Question": "Which particle?", "Correct Answer": "muon", "Incorrect Answer 1": "pion",
    "Incorrect Answer 2": "kaon", "Incorrect Answer 3": "gluon", "High-level domain": "Physics",
}  # fmt: skip
DAPO = {
    "data_source": "math_dapo", "prompt": [{"role": "user", "content": "What is 2 + 2?"}], "ability": "MATH",
    "reward_model": {"ground_truth": "4", "style": "rule"}, "extra_info": {"index": "ab-1"},
}  # fmt: skip
TESTS = {"inputs": ["1 2"], "outputs": ["3"]}
LEETCODE = {
    "data_source": "leetcode", "ability": "code", "extra_info": json.dumps({"index": 7}),
    "prompt": json.dumps([{"role": "user", "content": "Add the numbers."}]),
    "reward_model": json.dumps({"ground_truth": json.dumps(TESTS), "style": "rule"}),
}  # fmt: skip
SCIENCE = {
    "data_source": "MegaScience", "prompt": [{"role": "user", "content": "How fast?"}], "ability": "science",
    "reward_model": {"ground_truth": "3 m/s", "style": "rule"}, "extra_info": {},
}  # fmt: skip


def lcb(public, private, **more):
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(private)))).decode()
    return {
        "question_title": "Sum", "question_content": "Read two numbers, print their sum.", "platform": "atcoder",
        "question_id": "abc_a", "contest_date": "2025-02-01T00:00:00", "starter_code": "", "difficulty": "easy",
        "public_test_cases": json.dumps(public), "private_test_cases": packed, "metadata": "{}", **more,
    }  # fmt: skip


def case(i, o):
    return {"input": i, "output": o, "testtype": "stdin"}


LCB = lcb([case("1 2\n", "3\n")], [case("1 2\n", "3\n"), case("98765 4321\n", "103086\n")])


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize(
    ("row", "answer", "name", "source", "problem"),
    [
        (GSM8K, "7", "gsm8k", "gsm8k", GSM8K["question"]),
        (AIME, "204", "aime", "aime_2024", AIME["problem"]),
        (AIME_UPPER, "25", "aime", "aime_2024", "Find the sum of y."),
        (GPQA, "C", "gpqa", "gpqa", GPQA["problem"]),
        (DAPO, "4", "math", "math_dapo", "What is 2 + 2?"),
        (LEETCODE, TESTS, "code", "leetcode", "Add the numbers."),
        (SCIENCE, "3 m/s", "science", "MegaScience", "How fast?"),
        (LCB, {"inputs": ["98765 4321\n"], "outputs": ["103086\n"]}, "code", "livecodebench", LCB["question_content"]),
    ],
)
def test_each_format(tmp_path, row, answer, name, source, problem):
    (task,) = read_tasks(write(tmp_path / "aime_2024.jsonl", [row]))
    assert (task.answer, task.source, task.extra["family"]) == (answer, source, name)
    assert task.extra["problem"] == problem and task.extra["grader"] == TEMPLATES[name].grader
    (message,) = task.messages
    assert message.role == "user" and problem in message.content and TOOL_HINT in message.content
    assert message.content.startswith(TEMPLATES[name].preamble) and message.content.endswith(TEMPLATES[name].ending)


def only(tmp_path, row):
    (task,) = read_tasks(write(tmp_path / "a.jsonl", [row]))
    return task


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"problem": "p", "solution": r"first \boxed{3}, finally \boxed{\frac{3}{4}}"}, r"\frac{3}{4}"),
        ({"problem": "p", "solution": r"so x is \boxed{1} or \boxed{2}"}, "1, 2"),
        ({"question": "p", "final_answer": ["3", "5"]}, ["3", "5"]),
        ({"question": "p", "final_answer": ["3"]}, "3"),
        ({"question": "p", "answer": [3, 5.0]}, ["3", "5"]),
    ],
)
def test_the_answer_of_a_plain_row(tmp_path, row, answer):
    assert only(tmp_path, row).answer == answer


@pytest.mark.parametrize("answer", [{"value": 3}, [[1, 2]], []])
def test_an_answer_that_is_no_text_is_a_bad_row(tmp_path, answer):
    table = read_tasks(write(tmp_path / "a.jsonl", [AIME, {"question": "q", "answer": answer}]))
    assert len(table) == 1 and "answer" in table.skipped[0]


def test_a_prompt_of_messages_beside_an_answer(tmp_path):
    task = only(tmp_path, {"prompt": [{"role": "user", "content": "Q"}], "answer": "5"})
    assert task.extra["problem"] == "Q" and "{" not in task.messages[0].content.replace("\\boxed{}", "")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Q"}]}]
    task = only(tmp_path, {"prompt": json.dumps(asked), "answer": "5"})
    assert [(m.role, m.content) for m in task.messages] == [("system", "Be brief."), ("user", "Q")]


MMLU = {"question": "Which is prime?", "choices": ["4", "7", "9", "8"], "answer": 1}


@pytest.mark.parametrize(
    "row",
    [
        MMLU,
        {**MMLU, "answer": "B"},
        {**MMLU, "answer": "(B)"},
        {**MMLU, "answer": "7"},
        {"question": MMLU["question"], "options": ["A) 4", "B) 7", "C) 9", "D) 8"], "answer": "B"},
        {"question": MMLU["question"], "options": {"A": "4", "B": "7", "C": "9", "D": "8"}, "answer": "B"},
        {
            "question": MMLU["question"],
            "choices": {"text": MMLU["choices"], "label": ["1", "2", "3", "4"]},
            "answerKey": "2",
        },
    ],
)
def test_a_multiple_choice_row_shows_its_options(tmp_path, row):
    task = only(tmp_path, row)
    assert task.answer == "B" and task.extra["grader"] == "choice"
    assert "Which is prime?\n\n(A) 4\n(B) 7\n(C) 9\n(D) 8" in task.messages[0].content


@pytest.mark.parametrize("change", [{"answer": "E"}, {"answer": 5}, {"choices": ["7"]}, {"choices": ["7", None]}])
def test_a_choice_without_a_right_option_is_a_bad_row(tmp_path, change):
    table = read_tasks(write(tmp_path / "a.jsonl", [AIME, {**MMLU, **change}]))
    assert len(table) == 1 and "option" in table.skipped[0]


def test_the_four_options_of_gpqa_are_shuffled_by_the_question_alone(tmp_path):
    rows = [{**GPQA_RAW, "Question": f"Which particle is number {i}?"} for i in range(60)]
    tasks = read_tasks(write(tmp_path / "a.jsonl", rows))
    assert tasks == read_tasks(tmp_path / "a.jsonl")
    assert {t.answer for t in tasks} == set("ABCD")
    for task in tasks:
        assert f"({task.answer}) muon" in task.messages[0].content
        assert all(f"{x}\n" in task.messages[0].content + "\n" for x in ("pion", "kaon", "gluon"))


def test_fault_16_a_mixed_file_gets_its_template_row_by_row(tmp_path):
    rows = [DAPO, LEETCODE, GSM8K, SCIENCE, AIME, GPQA, LCB]
    for order in (rows, rows[::-1]):
        tasks = read_tasks(write(tmp_path / "mixed.jsonl", order))
        families = [t.extra["family"] for t in tasks]
        assert families == (["math", "code", "gsm8k", "science", "math", "gpqa", "code"][:: 1 if order is rows else -1])
        assert all(
            t.messages[0].content.startswith(TEMPLATES[f].preamble) for t, f in zip(tasks, families, strict=True)
        )
    assert len({t.preamble for t in TEMPLATES.values()}) == len(TEMPLATES), "each source has its own"


def test_fault_8_what_grades_a_program_never_enters_its_prompt(tmp_path):
    functional = lcb(
        [case("[1]\n2", "[3]")], [case("[55555]\n66666", "[77777]")],
        starter_code="class Solution:\n    def add(self, xs, y):\n        ", metadata=json.dumps({"func_name": "add"}),
    )  # fmt: skip
    verl = {**LEETCODE, "reward_model": {"ground_truth": {"inputs": ["88888"], "outputs": ["99999"]}, "style": "rule"}}
    asserts = {
        **LEETCODE,
        "reward_model": {"ground_truth": {"assert_case": ["assert add(44444) == 33333"]}, "style": "r"},
    }
    tasks = read_tasks(write(tmp_path / "a.jsonl", [LCB, functional, verl, asserts]))
    text = "\n".join(m.content for t in tasks for m in t.messages)
    for secret in ("98765", "103086", "55555", "66666", "77777", "88888", "99999", "44444", "33333"):
        assert secret not in text
    assert "98765 4321\n" in tasks[0].answer["inputs"] and tasks[1].answer["fn_name"] == "add"
    assert "def add(self, xs, y):" in tasks[1].messages[0].content
    assert tasks[3].answer == {"assert_case": ["assert add(44444) == 33333"]}


def test_the_answer_is_never_in_the_prompt_of_a_word_problem(tmp_path):
    (task,) = read_tasks(write(tmp_path / "a.jsonl", [GSM8K]))
    assert "####" not in task.messages[0].content and "<<" not in task.messages[0].content


def test_a_pickle_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    packed = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    table = read_tasks(write(tmp_path / "a.jsonl", [LCB, {**LCB, "private_test_cases": packed}]))
    assert len(table) == 1 and "pickled" in table.skipped[0]
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "", "answer": "#### 5"}, "no prompt"),
        ({"question": "Q", "answer": "#### "}, "no answer"),
        ({"question": "Q", "answer": None}, "no answer"),
        ({"problem": "Q", "answer": ""}, "no answer"),
        ({"problem": None, "answer": "5"}, "no prompt"),
        ({"problem": "Q"}, "no answer"),
        ({"text": "Q"}, "no known format"),
        ({}, "no known format"),
        ({**DAPO, "prompt": []}, "no prompt"),
        ({**DAPO, "prompt": 5}, "no prompt"),
        ({**DAPO, "prompt": [{"role": "user", "content": " "}]}, "no prompt"),
        ({**DAPO, "reward_model": None}, "no answer"),
        ({**DAPO, "reward_model": {"style": "rule"}}, "no answer"),
        ({**GPQA, "solution": "no box"}, "no answer"),
        ({**GPQA_RAW, "Incorrect Answer 2": ""}, "four options"),
        (lcb([], []), "no answer"),
        ({**LCB, "private_test_cases": "!!!"}, "cannot be opened"),
        ("5", "not an object"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_row_is_named_with_its_reason(tmp_path, row, reason):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(AIME) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    table = read_tasks(file)
    assert len(table) == 1 and len(table.skipped) == 1
    assert table.skipped[0].startswith(f"{file} row 2: ") and reason in table.skipped[0]


def test_mistakes_of_the_user(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        read_tasks(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"gsm9k.*unknown.*gsm8k"):
        read_tasks(write(tmp_path / "a.jsonl", [GSM8K]), format="gsm9k")
    with pytest.raises(UserError, match="3 of 4 rows are bad"):
        read_tasks(write(tmp_path / "b.jsonl", [GSM8K, {}, {}, {}]))
    with pytest.raises(UserError, match="empty"):
        read_tasks(write(tmp_path / "c.jsonl", []))


def test_a_forced_format(tmp_path):
    file = write(tmp_path / "a.jsonl", [GSM8K, {"question": "Q", "answer": "5"}])
    assert [t.answer for t in read_tasks(file)] == ["7", "5"]
    assert read_tasks(file, format="gsm8k").skipped[0].endswith("the answer does not end in '#### N'")
    assert set(FORMATS) >= {"gsm8k", "aime", "verl", "gpqa", "livecodebench"}


def test_bare_problems_are_put_without_a_template(tmp_path):
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    rows = [GSM8K, AIME, {**DAPO, "prompt": conversation}]
    file = write(tmp_path / "a.jsonl", rows)
    usual, bare = read_tasks(file), read_tasks(file, format="bare")
    assert [t.messages[-1].content for t in bare[:2]] == [t.extra["problem"].strip() for t in usual[:2]]
    assert bare[2].messages == usual[2].messages  # a conversation of the row stays whole
    same = ("id", "answer", "source", "extra")
    assert [[getattr(t, name) for name in same] for t in bare] == [[getattr(t, name) for name in same] for t in usual]
    write_tasks(tmp_path / "rl.parquet", list(bare))
    assert list(read_tasks(tmp_path / "rl.parquet", format="bare")) == list(bare)


def test_without_tools_the_prompt_does_not_speak_of_them(tmp_path):
    file = write(tmp_path / "a.jsonl", [GSM8K, DAPO, LCB])
    assert all(TOOL_HINT not in t.messages[0].content for t in read_tasks(file, tools=False))


def test_a_conversation_of_the_row_is_kept_as_it_is(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    (task,) = read_tasks(write(tmp_path / "a.jsonl", [{**DAPO, "prompt": prompt}]))
    assert [(m.role, m.content) for m in task.messages] == [("system", "Be brief."), ("user", "2 + 2?")]


def test_ids_are_unique_and_stable(tmp_path):
    file = write(tmp_path / "a.jsonl", [AIME, AIME, DAPO, GSM8K, GSM8K])
    ids = [t.id for t in read_tasks(file)]
    assert ids == ["a/60", "a/60#a.jsonl:2", "math_dapo/ab-1", "gsm8k/4", "gsm8k/5"]


def test_several_right_answers_and_lists_as_answers(tmp_path):
    rows = [
        {**DAPO, "reward_model": {"ground_truth": t, "style": "rule"}}
        for t in ('["1/2"]', "[1, 2]", 5, 5.0, '["a", "b"]')
    ]
    assert [t.answer for t in read_tasks(write(tmp_path / "a.jsonl", rows))] == ["1/2", "[1, 2]", "5", "5", ["a", "b"]]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_parquet_and_jsonl_give_the_same_tasks(tmp_path, suffix):
    rows = [DAPO, {**SCIENCE, "extra_info": {"index": "s"}}]
    file = tmp_path / f"a{suffix}"
    write(file, rows) if suffix == ".jsonl" else write_parquet(file, rows)
    assert [(t.id, t.answer, t.extra["family"]) for t in read_tasks(file)] == [
        ("math_dapo/ab-1", "4", "math"),
        ("MegaScience/s", "3 m/s", "science"),
    ]


def test_what_is_written_is_read_back_equal(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    rows = [
        GSM8K,
        AIME,
        GPQA,
        GPQA_RAW,
        DAPO,
        LEETCODE,
        SCIENCE,
        LCB,
        {**DAPO, "prompt": prompt, "extra_info": {"index": 9}},
    ]
    tasks = read_tasks(write(tmp_path / "mixed.jsonl", rows))
    tasks[0].extra["pass_rate"] = 0.5
    write_tasks(tmp_path / "out.parquet", tasks)
    assert read_tasks(tmp_path / "out.parquet") == tasks


def test_families_by_name():
    names = {
        "openai/gsm8k": "gsm8k", "HuggingFaceH4/aime_2024": "aime", "BytedTsinghua-SIA/DAPO-Math-17k": "math",
        "MegaScience/MegaScience": "science", "livecodebench/code_generation_lite": "code",
        "Skywork/Skywork-OR1-RL-Data": "math",
        "Idavidrein/gpqa": "gpqa", "": "math",
    }  # fmt: skip
    assert {name: family(name) for name in names} == names
    assert family("Skywork/Skywork-OR1-RL-Data", "code") == "code"


PROBLEMS = Path(__file__).parents[3] / "shared" / "data" / "problems"


@pytest.mark.skipif(not PROBLEMS.exists(), reason="the real files are not here")
@pytest.mark.parametrize(
    ("name", "count", "first"),
    [("gsm8k_train", 7473, "72"), ("gsm8k_test", 1319, "18"), ("aime_2024", 30, "204"), ("aime_2025", 30, "70")],
)
def test_the_real_files(name, count, first):
    tasks = read_tasks(PROBLEMS / f"{name}.jsonl")
    assert len(tasks) == count and not tasks.skipped and tasks[0].answer == first
    assert all(t.answer.lstrip("-").replace(".", "").isdigit() for t in tasks)
    assert {t.extra["family"] for t in tasks} == {name.partition("_")[0]}


def test_a_prompt_that_no_template_made_is_kept_as_it_is(tmp_path):
    from open_agentrl_jax.data import synthetic

    made = synthetic.problems(0, 3)
    write_tasks(tmp_path / "rl.parquet", made, [{"pass_rate": 0.5}] * 3)
    back = read_tasks(tmp_path / "rl.parquet")
    assert [t.messages for t in back] == [t.messages for t in made] and [t.answer for t in back] == [
        t.answer for t in made
    ]
