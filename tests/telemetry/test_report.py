import base64
import contextlib
import gzip
import hashlib
import io
import json
import re
import socket
import subprocess
import sys
import threading

import httpx
import numpy as np
import pytest
from rich.console import Console

from launch import report as command
from open_agentrl_jax.telemetry import overview, report, server
from open_agentrl_jax.telemetry.index import Table
from open_agentrl_jax.telemetry.tokens import pack_tokens, unpack_tokens

from .runs import add_tokenizer, trajectory, write_run

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


def parts(html):
    found = re.findall(r'<script type="text/plain" id="(\d+:\w+)">([^<]*)</script>', html)
    return {name: gzip.decompress(base64.b64decode(text)) for name, text in found}


def test_tokens_come_back():
    one = trajectory(1.0, version=3, tokens=40)
    ids, logprobs, versions = unpack_tokens(json.loads(json.dumps(pack_tokens(one))))
    assert (ids == one.tokens).all() and (versions == one.versions).all()
    np.testing.assert_allclose(logprobs, one.logprobs, rtol=1e-3)
    one.tokens, one.loss_mask = one.tokens[:0], one.loss_mask[:0]
    one.logprobs, one.versions = one.logprobs[:0], one.versions[:0]
    assert [len(x) for x in unpack_tokens(pack_tokens(one))] == [0, 0, 0]


def test_the_file_holds_all_of_the_run_and_no_markup_of_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "CHUNK_BYTES", 3000)
    write_run(tmp_path, words=HOSTILE)
    add_tokenizer(tmp_path)
    html = report.write_report([tmp_path]).read_text()
    held = parts(html)
    lines = b"".join(held[f"0:chunk{i}"] for i in range(len(held) - 3))
    assert lines == (tmp_path / "trajectories.jsonl").read_bytes() and len(held) > 6
    head, index = json.loads(held["0:head"]), json.loads(held["0:index"])
    assert head["rows"] == len(index["step"]) == 42 and head["left_out"] == 0
    assert head["metrics"]["rl"]["reward/mean"] == [0.2, 0.4, 0.6, 0.8, 1]
    assert head["metrics"]["eval"]["step"] == [0, 5]
    assert json.loads(held["0:vocabulary"])["0"] == "<b>bold</b>"
    assert "hacked" not in html
    script = html.rpartition("<script>")[2].rpartition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html and "unsafe" not in html.partition("<style>")[0]


def test_nothing_is_fetched_from_elsewhere():
    html = report.page("")
    assert not re.search(r"<(link|img|iframe)\b|@import|url\(|src=", html.partition("<script>")[0])
    assert "Permission is hereby granted" in html  # the plot library's licence goes with it


def test_a_run_too_large_for_one_file_keeps_whole_groups(tmp_path, monkeypatch):
    write_run(tmp_path, steps=10)
    monkeypatch.setattr(report, "EMBEDDED_BYTES", (tmp_path / "trajectories.jsonl").stat().st_size // 3)
    held = parts(report.write_report([tmp_path]).read_text())
    head, index = json.loads(held["0:head"]), json.loads(held["0:index"])
    assert head["rows"] + head["left_out"] == 72 and 12 <= head["rows"] <= 36
    assert index["sample"] == [0, 1, 2] * (head["rows"] // 3) and set(index["step"]) >= {1, 9}


def test_the_index_follows_a_growing_file_and_starts_anew_after_a_cut(tmp_path):
    path = write_run(tmp_path, steps=2, problems=1) / "trajectories.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    table = Table(path)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:20])  # the fifth is being written
    table.update()
    assert len(table) == 4 and table.groups() == [(0, 3), (3, 4)]
    path.write_bytes(whole)
    table.update()
    assert len(table) == len(lines) and table.read(4, 6) == b"".join(lines[4:6])
    path.write_bytes(b"".join(lines[:2]))
    table.update()
    assert len(table) == 2


DAMAGED = {
    "cut off": b'{"step": 3, "problem',
    "no reward": b'{"step": 3, "problem_id": "p", "accuracy": 0, "stop": "answer"}',
    "not a number": b'{"step": 3, "problem_id": "p", "accuracy": 0, "stop": "answer", "reward": NaN}',
    "text for a number": b'{"step": "3", "problem_id": "p", "accuracy": 0, "stop": "answer", "reward": 1}',
    "tokens": b'{"step": 3, "problem_id": "p", "accuracy": 0, "stop": "answer", "reward": 1, "tokens": '
    b'{"ids": "eJwDAAAAAAE=", "logprobs": "eJwDAAAAAAE=", "spans": [[3, 1]]}}',
    "bytes": b"\xff\x00\x00",
    "no object": b"[1]",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_damaged_lines_are_skipped_and_counted(tmp_path, line):
    write_run(tmp_path, steps=1)
    whole = {}
    for name in ("trajectories.jsonl", "metrics.jsonl"):
        whole[name] = (tmp_path / name).read_bytes().splitlines(keepends=True)
        (tmp_path / name).write_bytes(b"".join([whole[name][0], line + b"\n", *whole[name][1:]]))
    held = parts(report.write_report([tmp_path]).read_text())
    head = json.loads(held["0:head"])
    assert (head["rows"], head["damaged"]) == (18, 1)
    assert b"".join(held[f"0:chunk{i}"] for i in range(len(held) - 3)) == b"".join(whole["trajectories.jsonl"])
    assert sum(len(columns["step"]) for columns in head["metrics"].values()) == len(whole["metrics.jsonl"])
    assert "18 trajectories; 1 damaged lines left out" in shown(tmp_path)


def shown(run):
    console = Console(file=io.StringIO(), width=200)
    overview.show(run, console)
    return console.file.getvalue()


def test_the_terminal_shows_no_control_characters(tmp_path):
    path = write_run(tmp_path, steps=1) / "trajectories.jsonl"
    path.write_text(path.read_text().replace('"problem 0"', json.dumps("a\x1b]52;c;ZXZpbA==\x07[red]b")))
    text = shown(tmp_path)
    assert "a]52;c;ZXZpbA==[red]b" in text and not set(text) & {"\x1b", "\x07"}


def test_the_secrets_of_an_old_run_stay_out_of_the_report(tmp_path):
    write_run(tmp_path, steps=1)
    config = {"sandbox": {"urls": ["https://me:s3cret@host"]}, "agent": {"tools": ["mcp:npx x --api-key s3cret"]}}
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    head = parts(report.write_report([tmp_path]).read_text())["0:head"]
    assert b"https://***@host" in head and b"s3cret" not in head


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/metrics.jsonl"], "metrics.jsonl: missing; give the directory of a run"),
        (["a/nothing"], "metrics.jsonl: missing; give the directory of a run"),
        (["b"], "no line is a JSON object with step and phase"),
        (["c"], "metrics.jsonl: Is a directory; give the directory of a run"),
        (["a", "--output=a"], "a: Is a directory; give another file"),
        (["a", "--output=none/x.html"], "x.html: No such file or directory; give another file"),
        (["a", "--output=a/metrics.jsonl/x.html"], "x.html: Not a directory; give another file"),
        ([], "no run given"),
        (["--serve=a/metrics.jsonl"], "not a folder; give the one that holds the runs"),
        (["--serve=a", "--port=99999"], "port 99999 at 127.0.0.1"),
        (["--serve=a", "--host=0.0.0.0", "--port=0"], "host 0.0.0.0: other machines can reach it"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    write_run(tmp_path / "a", steps=1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text("no JSON\n")
    (tmp_path / "c" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        command.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and message in error


def test_the_command_shows_and_writes(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", steps=3)
    arguments = [tmp_path / "a", tmp_path / "b", "--output", tmp_path / "both.html"]
    done = subprocess.run([sys.executable, "-m", "launch.report", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rl reward/mean" in done.stdout and "0.67 of 3 right: problem 0" in done.stdout
    held = parts((tmp_path / "both.html").read_text())
    assert [json.loads(held[f"{i}:head"])["name"] for i in (0, 1)] == ["a", "b"]


@contextlib.contextmanager
def served(root, host="127.0.0.1", **options):
    with server.make_server(root, host, 0, **options) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        with httpx.Client(base_url=f"http://127.0.0.1:{serving.server_address[1]}") as client:
            yield client
        serving.shutdown()


def test_a_server_gives_the_same_parts(tmp_path):
    write_run(tmp_path / "a")
    with served(tmp_path) as client:
        assert "connect-src 'self'" in client.get("/").text
        assert client.get("/data").json() == ["a"]
        assert client.get("/data/a/head").json()["rows"] == 42
        lines = client.get("/data/a/chunk0").text
        assert lines == (tmp_path / "a" / "trajectories.jsonl").read_text()
        with open(tmp_path / "a" / "trajectories.jsonl", "ab") as file:
            file.write(lines.splitlines()[0].encode() + b"\n")
        assert client.get("/data/a/head").json()["rows"] == 43
        odd = ("chunk1", "chunk", "chunk-1", "chunk%C2%B2", "chunk" + "9" * 5000, "%00")
        for path in (
            "/data/b/head",
            "/data/..%2f/head",
            "/data/%2e%2e/head",
            "/x",
            *(f"/data/a/{part}" for part in odd),
        ):
            assert client.get(path).status_code == 404, path


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://[::1]:3000"}, 200),
    ],
)
def test_pages_of_other_sites_cannot_read_a_run(tmp_path, headers, status):
    write_run(tmp_path, steps=1)
    with served(tmp_path) as client:
        assert client.get("/data", headers=headers).status_code == status


def test_a_server_for_other_machines_needs_its_token(tmp_path):
    write_run(tmp_path / "a", steps=1)
    with served(tmp_path, "0.0.0.0", token="s3cret, yes") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": "report_token=wrong"}, {"Cookie": b"\xff=;"}):
            assert client.get("/data/a/head", headers=headers).status_code == 401
        assert client.get("/?token=wrong").status_code == 401
        bearer = {"Authorization": "Bearer s3cret, yes", "Host": "node7:8008"}
        assert client.get("/data", headers=bearer).json() == ["a"]
        login = client.get("/", params={"token": "s3cret, yes"})
        assert login.status_code == 303 and login.headers["Location"] == "/"
        assert "HttpOnly" in login.headers["Set-Cookie"] and "SameSite=Strict" in login.headers["Set-Cookie"]
        assert client.get("/data").json() == ["a"]  # with the cookie


def test_half_sent_requests_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    with served(tmp_path) as client:
        half = [socket.create_connection(("127.0.0.1", client.base_url.port), timeout=10) for _ in range(5)]
        for connection in half:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        assert client.get("/data").json() == []
        assert [connection.recv(1) for connection in half] == [b""] * 5
        for connection in half:
            connection.close()


def test_groups_are_those_of_the_writer(tmp_path):
    table = Table(write_run(tmp_path, steps=1) / "trajectories.jsonl")
    table.update()
    assert [end - first for first, end in table.groups()] == [3] * 6
