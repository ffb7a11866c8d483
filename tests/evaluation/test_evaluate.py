"""The figures of an evaluation, from trajectories by hand."""

from open_agentrl_jax.collect.journal import tokenless
from open_agentrl_jax.evaluation.evaluate import livecodebench, per_problem, report
from open_agentrl_jax.types import Group, Message, Task


def episode(accuracy, calls=0, succeeded=0, first_call=-1.0, stop="answer", prediction="4"):
    metrics = {"tool_calls": float(calls), "tool_success": float(succeeded), "first_call": first_call}
    return tokenless([], stop, accuracy=accuracy, prediction=prediction, metrics=metrics)


def test_what_is_said_of_the_tool():
    trajectories = [
        episode(1.0, 2, 2, 10.0),  # deliberative
        episode(0.0, 2, 1, 20.0),  # one of two succeeded: reactive
        episode(0.0, 9, 9, 30.0),  # too many: reactive
        episode(1.0),  # none
        episode(1.0, 4, 4, 40.0, stop="aborted"),  # lost: in no figure
    ]
    figures = report([Group(Task("p", [], "4"), trajectories)])
    tools = figures["tools"]
    assert figures["episodes"] == {"all": 5, "graded": 4, "aborted": 1} and figures["accuracy"]["avg@5"]["value"] == 0.5
    assert tools["calls_a_response"] == 13 / 4 and tools["calls_succeeded"] == 12 / 13
    assert tools["responses_without_call"] == 0.25 and tools["tokens_before_first_call"] == 20
    assert tools["accuracy_by_calls"][2] == {"responses": 2, "accuracy": 0.5}
    assert tools["accuracy_by_mode"] == {
        "deliberative": {"share": 0.25, "accuracy": 1.0},
        "none": {"share": 0.25, "accuracy": 1.0},
        "reactive": {"share": 0.5, "accuracy": 0.0},
    }


def test_each_problem_with_what_was_not_graded():
    groups = [Group(Task("p", [], "4", "s"), [episode(1.0), episode(0.0, stop="aborted")])]
    assert per_problem(groups) == [{"id": "p", "source": "s", "accuracy": [1.0, None]}]


def test_livecodebench_reads_its_own_format():
    def group(name, *programs, **extra):
        task = Task(name, [], {}, extra={"question_id": name, "grader": "code", **extra})
        return Group(task, [episode(0.0, prediction=p) for p in programs])

    other = Group(Task("aime", [], "4"), [episode(1.0)])
    assert livecodebench([group("b", "print(1)", ""), other, group("a", "x = 1", "y")]) == [
        {"question_id": "a", "code_list": ["x = 1", "y"]},
        {"question_id": "b", "code_list": ["print(1)", ""]},
    ]
    assert livecodebench([other]) == []


def test_rows_that_repeat_a_problem_are_more_samples_of_it():
    def row(name, accuracies, text="2+2?"):
        return Group(Task(name, [Message("user", text)], "4"), [episode(a) for a in accuracies])

    repeated = [row(f"p{i}", [1.0]) for i in range(32)] + [row(f"q{i}", [0.0], "3+3?") for i in range(32)]
    once = [row("p", [1.0] * 32), row("q", [0.0] * 32, "3+3?")]
    figures = report(repeated)
    assert figures["accuracy"] == report(once)["accuracy"], "no narrower intervals than those of two problems"
    assert figures["problems_and_rows"] == {"problems": 2, "rows": 64}
    assert [(p["id"], len(p["accuracy"])) for p in per_problem(repeated)] == [("p0", 32), ("q0", 32)]
    uneven = report([row("p", [1.0]), row("p again", [0.0, 1.0]), row("q", [0.0], "3+3?")])
    assert uneven["accuracy"]["avg@3"]["value"] == (2 / 3) / 2


def test_nothing_graded_gives_counts_and_no_figures():
    figures = report([Group(Task("p", [], "4"), [episode(0.0, stop="aborted")] * 2)])
    assert figures["accuracy"] == {} and figures["episodes"] == {"all": 2, "graded": 0, "aborted": 2}
    assert report([])["episodes"]["all"] == 0
