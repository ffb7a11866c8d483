"""The shared harness of the benchmarks."""

import json
import sys

import pytest

from benchmarks import harness


def test_sides_take_turns_and_the_first_round_is_not_counted():
    calls = []

    def side(name):
        return lambda: calls.append(name) or float(len(calls))

    assert harness.in_turn({"a": side("a"), "b": side("b")}, 2) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert calls == ["a", "b"] * 3


def test_figures():
    assert harness.spread([3.0, 1.0, 2.0]) == {"seconds": 2.0, "lowest": 1.0, "highest": 3.0}
    assert harness.medians([{"x": 1.0}, {"x": 5.0}, {"x": 2.0}]) == {"x": 2.0}
    assert harness.timed(lambda: None, 3)["lowest"] >= 0


def test_a_report_prints_a_header_per_set_of_columns_and_saves_the_rows(tmp_path, capsys):
    report = harness.Report("name", ["--rounds=1"])
    report.add(side="a", seconds=0.123456)
    report.add(side="b", seconds=2.0)
    report.add(side="c", failed="why")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["side", "seconds"], ["a", "0.1235"], ["b", "2"], ["side", "failed"], ["c", "why"]]
    report.save(str(tmp_path / "out.json"))
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["command"] == ["name", "--rounds=1"]
    assert saved["rows"][1] == {"side": "b", "seconds": 2.0}


SERVE = "from benchmarks import harness; harness.serve(lambda: None)"


def test_workers_run_once_per_request():
    with harness.workers({"one": [sys.executable, "-c", SERVE]}) as sides:
        assert sides["one"]() >= 0
        assert sides["one"]() >= 0


def test_a_worker_that_does_not_start_is_named():
    with pytest.raises(RuntimeError, match="one did not start"), harness.workers({"one": [sys.executable, "-c", ""]}):
        pass
