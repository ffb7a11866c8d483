"""The five commands of docs/data.md, as they stand there, at a tiny size; every file between them is looked into."""

import json
import random
import re
import subprocess
import sys

import pytest

from configs import gsm8k_chain
from launch import assemble
from open_agentrl_jax.data.conversations import read_conversations
from open_agentrl_jax.data.prompts import read_tasks
from open_agentrl_jax.data.rows import read_table
from tests.launch.runs import ROOT, environment, lines
from tests.launch.teacher import completion, serving

pytestmark = pytest.mark.xdist_group("chain")  # one worker, or each would run all five commands
COMMANDS = re.findall(r"^python -m launch\.(\w+)( \$CHAIN.*)$", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE)


def question(a, b):
    """A problem that a model without any skill solves half of the time, once it knows what an answer looks like."""
    text = f"Ann has {a} and Ben {b}. Is Ann ahead? Say 1 or 0."  # short: contaminated only where it is the same
    return {"question": text, "answer": f"#### {int(a > b)}"}


def reply(messages):
    a, b = map(int, re.search(r"Ann has (\d+) and Ben (\d+)", messages[0]["content"]).groups())
    return completion({"content": f"The answer is \\boxed{{{int(a > b)}}}."}, 9)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Where the five commands ran, and what each said."""
    root = tmp_path_factory.mktemp("chain")
    pairs = [(a, b) for a in range(10, 40) for b in range(10, 40) if a != b]
    random.Random(0).shuffle(pairs)
    rows = [json.dumps(question(a, b)) + "\n" for a, b in pairs]
    contest = [json.dumps({"problem": question(*pair)["question"], "answer": "1"}) + "\n" for pair in pairs[60:64]]
    for name, part in (("train", rows[:48]), ("test", rows[44:52]), ("aime", contest)):  # four of train are in test
        (root / f"{name}.jsonl").write_text("".join(part))
    config = gsm8k_chain.get_config()
    config.model.new.hidden_size, config.model.new.num_layers = 64, 2
    assemble.create_model(config, root / "model")
    tiny = {
        "model.path": root / "model", "data.train": root / "train.jsonl", "data.eval": f"gsm8k={root / 'test.jsonl'}",
        "sft.steps": 40, "sft.batch_size": 8, "sft.optim.lr": 5e-3, "rl.steps": 2, "rl.prompts": 4, "rl.samples": 4,
        "agent.max_prompt": 384, "agent.max_response": 24, "sft.max_length": 408, "rollout.slots": 16,
        "rollout.concurrency": 16, "eval.samples": 2,
    }  # fmt: skip
    flags = ["--config=configs/gsm8k_chain.py", *(f"--config.{name}={value}" for name, value in tiny.items())]
    said = {}
    with serving(reply=reply) as server:
        teacher = f"--endpoint={server.url} --endpoint_model=t"
        given = {"CHAIN": " ".join(flags), "TEACHER": teacher, "OUT": str(root / "out")}
        for name, rest in COMMANDS:
            line = f"{sys.executable} -m launch.{name} {rest.replace('aime_2025.jsonl', str(root / 'aime.jsonl'))}"
            done = subprocess.run(
                ["sh", "-c", line], cwd=ROOT, env=environment() | given, capture_output=True, text=True, timeout=280
            )
            assert done.returncode == 0, (name, done.stderr[-3000:])
            said[name] = done.stdout
    return root, said, given


def test_the_page_names_the_five_commands():
    assert [name for name, _ in COMMANDS] == ["collect", "sft", "curate", "train", "evaluate"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_collected(chain):
    root, _, _ = chain
    card = json.loads((root / "out/collected/card.json").read_text())
    assert card["problems"] == {"read": 48, "contaminated": 4, "used": 44, "solved": 44}
    assert card["trajectories"]["kept"] == 44 and card["trajectories"]["duplicate"] == 3 * 44
    kept = read_conversations(root / "out/collected/sft.parquet")
    held_out = {json.loads(line)["question"] for line in (root / "test.jsonl").read_text().splitlines()}
    for conversation in kept:
        user, answer = conversation.messages
        assert not any(text in user.content for text in held_out)
        assert re.fullmatch(r"The answer is \\boxed\{[01]\}\.", answer.content) and conversation.tools


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trained_on_it(chain):
    losses = [line["loss"] for line in lines(chain[0] / "out/sft") if line["phase"] == "sft"]
    assert len(losses) == 40 and losses[-1] < 0.2 * losses[0]
    assert (chain[0] / "out/sft/export/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_curated(chain):
    root, _, given = chain
    folder = root / "out/curated"
    card = json.loads((folder / "card.json").read_text())
    difficulty = {row["class"]: row for row in card["difficulty"]}
    assert (card["counts"]["problems read"], card["counts"]["contaminated"]) == (48, 4)
    assert sum(row["before"] for row in difficulty.values()) == 44
    assert difficulty["solved"]["after"] == difficulty["unsolved"]["after"] == 0
    assert card["counts"]["rollouts"] + card["counts"]["rollouts spared by early stop"] == 44 * 8
    rates = read_table(folder / "rl.parquet", lambda row, file, i: (row["pass_rate"], row["right"], row["tries"]))
    assert len(rates) == card["counts"]["kept"] == sum(row["after"] for row in difficulty.values()) > 0
    assert all(0 < rate < 1 and rate == right / tries for rate, right, tries in rates)
    first = {t.messages[0].content: t.answer for t in read_tasks(root / "train.jsonl", format="gsm8k")}
    assert all(first[t.messages[0].content] == t.answer for t in read_tasks(folder / "rl.parquet"))
    # a kill that leaves half of the journal: the rest is played, with the same draws, and the set is the same
    (journal,) = folder.glob("journal-*.jsonl")
    whole, before = journal.read_bytes(), rates
    journal.write_bytes(whole[: len(whole) // 2])
    line = next(rest for name, rest in COMMANDS if name == "curate")
    again = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m launch.curate {line}"],
        cwd=ROOT, env=environment() | given, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr[-3000:]
    counts = json.loads((folder / "card.json").read_text())["counts"]
    assert 0 < counts["rollouts saved by the journal"] < counts["rollouts"]
    assert read_table(folder / "rl.parquet", lambda row, f, i: (row["pass_rate"], row["right"], row["tries"])) == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reinforced_and_evaluated(chain):
    root, said, _ = chain
    rl = [line for line in lines(root / "out/rl") if line["phase"] == "rl"]
    assert [line["step"] for line in rl] == [1, 2] and all(line["actor/skipped"] == 0 for line in rl)
    kept = {t.id for t in read_tasks(root / "out/curated/rl.parquet")}
    played = {t["problem_id"] for t in lines(root / "out/rl", "trajectories.jsonl") if t["phase"] == "rl"}
    assert played <= kept
    figures = json.loads((root / "out/aime_2025.json").read_text())
    assert figures["mode"] == "agentic" and figures["model"].endswith("out/rl/export")
    assert figures["episodes"] == {"all": 8, "aborted": 0} and len(figures["problems"]) == 4
    assert {p["id"].split("/")[0] for p in figures["problems"]} == {"aime_2025"}
    assert "aime_2025" in said["evaluate"] and "agentic" in said["evaluate"]
