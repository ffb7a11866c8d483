"""The math grader against hand-checked answers, hostile ones, and the reference's faults 7."""

import json
import logging
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_agentrl_jax.rewards import math, pool
from open_agentrl_jax.rewards.answers import compare
from open_agentrl_jax.rewards.math import canonical, extract, grade, last_box

ANSWERS = [
    json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize("kind", sorted({a["kind"] for a in ANSWERS}))
def test_hand_checked_answers(kind):
    for a in (a for a in ANSWERS if a["kind"] == kind):
        score = grade(f"We find \\boxed{{{a['prediction']}}}.", a["truth"])
        assert (score.accuracy, score.score) == ((1.0, 1.0) if a["right"] else (0.0, -1.0)), a
        assert score.status == "graded", a


def test_the_table_is_as_large_as_it_is_said_to_be():
    assert len(ANSWERS) >= 200
    assert len({(a["prediction"], a["truth"]) for a in ANSWERS}) == len(ANSWERS)


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{05}", "5"),
        (r"\boxed{1,234}", "1234"),
        (r"\boxed{A.}", "A"),
        (r"\boxed{42 }", "42"),
        (r"\boxed{42}" + " and so on" * 20, "42"),
    ],
)
def test_fault_7_fails_in_reference_and_is_mended_in_robust(text, truth):
    assert grade(text, truth, mode="reference").accuracy == 0
    assert grade(text, truth).accuracy == 1


def test_reference_mode_is_the_last_box_of_the_last_hundred_characters_as_a_string():
    inside, outside = "\\boxed{7}" + "." * 91, "\\boxed{7}" + "." * 92
    assert grade(inside, "7", mode="reference") == grade("\\boxed{7}", "7", mode="reference")
    assert grade(outside, "7", mode="reference").score == -1
    assert grade(r"\boxed{7} \boxed{8}", "8", mode="reference").prediction == "8"
    assert grade(r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", mode="reference").score == 1
    assert grade(r"\boxed{7", "7", mode="reference").score == -1
    assert grade("7", "7", mode="reference").score == -1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} then, no: \boxed{2}", "2"),  # several: the last
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{3} and then it was cut: \boxed{4", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\frac{a}{b}} {", r"\frac{a}{b}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"so \boxed 7.", "7"),
        ("<think>\\boxed{1}</think> it is \\boxed{2}", "2"),
        ("<think>\\boxed{1}</think> there is no box", None),
        ("The final answer is $\\frac{1}{2}$. I hope it helps.", "\\frac{1}{2}"),
        ("Final Answer: The final answer is 7.78.", "7.78"),
        ("**Answer:** 12 because 3 * 4", "12"),
        ("Answer: the area is 5", "5"),
        ("steps\n#### 18", "18"),
        ("The answer is 3.\nNo wait. The answer is 4.", "4"),
        ("The answer is \\[\n x^2 \n\\]", "\n x^2 \n"),
        ("42", "42"),
        ("$x = 5$", "x = 5"),
        ("I first tried 42 and then 43 but could not finish.", None),
        ("", None),
        ("\\boxed{}", ""),
    ],
)
def test_where_the_answer_is_found(text, answer):
    assert extract(text) == answer


def test_no_answer_is_wrong_and_not_a_failure():
    for text in ("", "I do not know.", "\\boxed{}", "\\boxed{5"):
        assert grade(text, "5") == math._score(False, "")


def test_boxes_joined_by_words_are_one_list_where_a_list_is_asked():
    assert grade(r"$\boxed{1}$ and $\boxed{2}$", "1, 2").accuracy == 1
    assert grade(r"\boxed{1}, \boxed{2}, and \boxed{3}", r"\{3,2,1\}").accuracy == 1
    assert grade(r"\boxed{1} \boxed{2}", "2").accuracy == 1
    assert grade(r"\boxed{1}. No! \boxed{2}", "1, 2").accuracy == 0


@pytest.mark.parametrize(
    ("text", "truth", "right"),
    [
        ("答案是 5", "5", 1),
        ("答案：5", "5", 1),
        ("最终答案是：$\\frac{1}{2}$。", "0.5", 1),
        ("所以答案为 12。", "12", 1),
        ("答案是 12，因为 3 乘 4。", "12", 1),
        ("答案是 1,234", "1234", 1),
        (r"x=\boxed{3} or x=\boxed{-1}", "3, -1", 1),
        (r"x=\boxed{3} or x=\boxed{-1}", "x=3 or x=-1", 1),
        (r"x=\boxed{3} or x=\boxed{-1}", "-1", 0),
        (r"$x_1 = \boxed{3}$, $x_2 = \boxed{-1}$", "-1, 3", 1),
        (r"$x = \boxed{3}$ and $y = \boxed{-1}$", "3, -1", 1),
        (r"\boxed{3} \text{ or } \boxed{-1}", "3,-1", 1),
        (r"\boxed{3} 或 \boxed{-1}", "3,-1", 1),
        (r"\boxed{3, -1}", r"\boxed{3} and \boxed{-1}", 1),
        (r"\boxed{3, -1}", r"x=\boxed{3} or x=\boxed{-1}", 1),
        (r"\boxed{3} is wrong, it is \boxed{4}", "4", 1),
        (r"\boxed{1,2}", r"$\boxed{1}\boxed{2}$", 1),
        (r"\boxed{1,2}", r"\boxed{1} papers and \boxed{2} bins", 1),
        (r"\boxed{2}", r"\boxed{1} papers and \boxed{2} bins", 0),
        (r"$$\boxed{(3, 3)} \text{ for part (a) and } \boxed{(1, 1)}$$", "$$(3, 3), (1, 1)$$", 1),
        (r"It is $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.$", r"(3, \frac{\pi}{2})", 1),
        (r"It is $\boxed{\begin{pmatrix}1\\2\end{pmatrix}}$", r"\begin{pmatrix}1\\2\end{pmatrix}", 1),
        (r"The answer is \boxed{5}. So the final answer is 6.", "5", 1),  # a box counts over words after it
        (r"The answer is \boxed{5}. So the final answer is 6.", "6", 0),
    ],
)
def test_joined_boxes_chinese_sentences_and_words_after_the_box(text, truth, right):
    assert (grade(text, truth).accuracy, grade(text, truth).status) == (right, "graded")


@pytest.mark.parametrize("truth", ["12:00", "1/0", "0.3\\overline{}", "\\frac{1}{0}"])
def test_a_truth_with_a_zero_below_is_no_failure(truth):
    assert grade(r"\boxed{5}", truth).status == "graded"
    assert grade(rf"\boxed{{{truth}}}", truth).accuracy == 1


def test_of_several_truths_any_one_will_do():
    assert grade(r"\boxed{0.5}", ["2", r"\frac{1}{2}"]).accuracy == 1
    assert grade(r"\boxed{0.4}", ["2", r"\frac{1}{2}"]).accuracy == 0


def test_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="lenient"):
        grade("", "5", mode="lenient")


@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_integers_are_compared_exactly(a, b):
    assert grade(f"\\boxed{{{a:,}}}", str(b)).accuracy == float(a == b)
    assert grade(f"\\boxed{{0{abs(a)}}}", str(abs(a))).accuracy == 1


@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=1000), st.integers(1, 50))
def test_a_fraction_equals_itself_in_every_spelling(x, by):
    n, d = x.numerator * by, x.denominator * by
    sign = "-" if n < 0 else ""
    for spelling in (f"\\dfrac{{{n}}}{{{d}}}", f"{sign}\\tfrac{{{abs(n)}}}{{{d}}}", f"{n}/{d}", f" $ {n} / {d} $ "):
        assert compare(spelling, f"\\frac{{{x.numerator}}}{{{x.denominator}}}") is True, spelling
    other = x + Fraction(1, 7)
    assert compare(f"{other.numerator}/{other.denominator}", str(x)) is False


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=6, unique=True), st.randoms())
def test_sets_have_no_order_and_tuples_do(items, random):
    shuffled = items[:]
    random.shuffle(shuffled)
    text, other = (", ".join(map(str, x)) for x in (items, shuffled))
    assert compare(f"\\{{{other}\\}}", f"\\{{{text}\\}}") is True
    assert compare(f"({other})", f"({text})") is (shuffled == items)


@settings(max_examples=300)
@given(
    st.text(alphabet=r"\{}()[]$%^_,.;=+-*/ 0123456789abxfrcboxdetqu" + "\n", max_size=80),
    st.sampled_from(["5", "x", "(1,2)"]),
)
def test_reading_an_answer_never_raises(text, truth):
    assert compare(text, truth) in (True, False, None)
    assert isinstance(canonical(text), str)
    assert grade(text, truth, mode="reference").status == "graded"
    last_box(text), extract(text), math.chain(text)


@given(st.text(max_size=200))
def test_the_text_of_a_box_is_found_again(text):
    if text.count("{") == text.count("}") == 0 and "\\" not in text:
        assert last_box(f"so \\boxed{{{text}}} it is") == text


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000 + "\\boxed{5}",
        "\\boxed{5}" + " so" * 333_333,
        "\\boxed{" * 140_000 + "\\boxed{5}",
        "{" * 999_990 + "\\boxed{5}",
        "answer is " * 100_000 + "\\boxed{5}",
        "$" * 1_000_000 + "\\boxed{5}",
    ],
)
def test_a_megabyte_around_the_answer(text):
    started = time.monotonic()
    assert grade(text, "5").accuracy == 1
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "box",
    [
        "x" * 1_000_000,
        "1+" * 500_000 + "1",
        "9" * 1_000_000,
        "\\frac{" * 200_000,
        "{" * 41 + "5" + "}" * 41,
        "," * 1_000_000,
    ],
)
def test_no_answer_is_a_megabyte_long_or_forty_braces_deep(box):
    started = time.monotonic()
    score = grade(f"\\boxed{{{box}}}", "5")
    assert (score.accuracy, score.status) == (0.0, "graded")
    assert len(score.prediction) <= math.MAX_ANSWER
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    "text", ["answer is " * 100_000, "$" * 1_000_000, "\\boxed{" * 140_000, "#### " * 200_000, "(" * 10**6]
)
def test_a_megabyte_of_nothing(text):
    started = time.monotonic()
    assert grade(text, "5").accuracy == 0
    assert time.monotonic() - started < 3


@pytest.fixture
def short_deadline(monkeypatch):
    hurried = pool.Pool(workers=1, deadline=0.5)
    monkeypatch.setattr(pool, "shared", lambda: hurried)
    math._equivalent.cache_clear()
    math._failures.clear()
    yield hurried
    hurried.close()
    math._equivalent.cache_clear()
    math._failures.clear()


def test_pathological_latex_is_a_failure_of_the_grader_never_a_wrong_answer(short_deadline):
    tower = "\\boxed{2^{2^{2^{2^{2^{2}}}}}}"
    started = time.monotonic()
    for _ in range(5):
        score = grade(tower, "4")
        assert (score.status, score.accuracy, score.score) == ("failed", 0.0, 0.0)
    assert time.monotonic() - started < 30
    assert grade(r"\boxed{\sqrt{16}}", "4").accuracy == 1, "the next answer finds a fresh worker"


def test_an_answer_that_failed_twice_is_not_waited_for_again(short_deadline):
    for _ in range(2):
        grade(r"\boxed{100!!!!}", "4")
    started = time.monotonic()
    assert grade(r"\boxed{100!!!!}", "4").status == "failed"
    assert time.monotonic() - started < 0.2


@pytest.mark.parametrize("box", ["(" * 990 + "5" + ")" * 990, "(1," * 600 + "1" + ")" * 600, "[" * 1990])
def test_brackets_without_end_are_no_answer(box):
    score = grade(f"\\boxed{{{box}}}", "5")
    assert (score.accuracy, score.status) == (0.0, "graded")
    assert canonical(box)


def test_disagreements_of_the_modes_are_logged_with_the_text(caplog):
    caplog.set_level(logging.INFO, logger="open_agentrl_jax.rewards.math")
    grade(r"we get \boxed{05}", "5")
    assert "we get" in caplog.text and "robust 1.0, reference 0.0" in caplog.text
    caplog.clear()
    grade(r"we get \boxed{5}", "5")
    assert not caplog.text


def test_canonical_gives_votes_one_key():
    assert len({canonical(x) for x in ("0.5", "\\frac{1}{2}", "1/2", " 2/4 ", "\\dfrac12", "$0.50$")}) == 1
    assert canonical("5") != canonical("6") and canonical("(1,2)") != canonical("[1,2]")
    assert canonical("x + 1") == canonical("x+1")
