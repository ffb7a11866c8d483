import pytest

from open_agentrl_jax.rewards.choice import extract, grade


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{A}", "A"),
        (r"\boxed{A.}", "A"),
        (r"\boxed{(A)}", "A"),
        (r"\boxed{a}", "A"),
        (r"\boxed{\text{A}}", "A"),
        (r"\boxed{\textbf{(A)}\ 5}", "A"),
        (r"\boxed{A) 5 cm}", "A"),
        (r"\boxed{Option A}", "A"),
        (r"\boxed{A: because}", "A"),
        (r"\boxed{A} or rather \boxed{B}", "B"),
        ("The answer is A.", "A"),
        ("**Answer: (C)**", "C"),
        ("The correct option is D because of B", "D"),
        ("answer is **A**", "A"),
        ("The answer is\n\nA", "A"),
        ("(B)", "B"),
        ("B.", "B"),
        ("<think>\\boxed{A}</think>\\boxed{B}", "B"),
        ("<think>\\boxed{A}</think>", ""),
        ("A good answer is hard to find", ""),
        ("My answer: I think it is hard", ""),
        (r"\boxed{5}", ""),
        (r"\boxed{AB}", ""),
        (r"\boxed{}", ""),
        ("", ""),
        (r"\boxed{A, B, C, D}", ""),
        (r"\boxed{A) or B)}", ""),
        (r"\boxed{A, (B)}", ""),
        (r"\boxed{A-D}", ""),
        (r"\boxed{A = B}", ""),
        (r"\boxed{\text{A. or B.}}", ""),
        (r"\boxed{A. Vitamin C}", "A"),
        (r"\boxed{A, because B is wrong}", "A"),
        ("Long. " * 30 + "The answer is A or B.", ""),
        ("Long. " * 30 + "The answer is A, B, C or D", ""),
        ("Long. " * 30 + "The answer is A/B", ""),
        ("Long. " * 30 + "The answer is A and not B", "A"),
        ("Long. " * 30 + "The answer is A, B is wrong", "A"),
        ("Long. " * 30 + "**Answer: A**", "A"),
        ("Long. " * 30 + "ANSWER: B", "B"),
        ("Long. " * 30 + "**Final Answer**\n\nC", "C"),
    ],
)
def test_the_letter(text, letter):
    assert extract(text) == letter
    score = grade(text, "A")
    assert (score.score, score.accuracy) == ((1.0, 1.0) if letter == "A" else (-1.0, 0.0))
    assert score.prediction == letter and score.status == "graded"


@pytest.mark.parametrize("truth", ["A", "A.", "(A)", "a", r"\text{A}"])
def test_the_truth_may_be_spelled_in_the_same_ways(truth):
    assert grade(r"\boxed{A}", truth).accuracy == 1
    assert grade(r"\boxed{B}", truth).accuracy == 0


def test_reference_mode_compares_strings():
    assert grade(r"\boxed{A}", "A", mode="reference").accuracy == 1
    assert grade(r"\boxed{A.}", "A", mode="reference").accuracy == 0


def test_a_truth_without_a_letter_is_a_failure_and_an_unknown_mode_an_error():
    assert grade("A", "42").status == "failed"
    with pytest.raises(ValueError, match="mode"):
        grade("A", "A", mode="x")
