"""The commands of docs/data.md, as they stand there, at a tiny size; every file between them is looked into."""

import json
import random
import re
import subprocess
import sys

import pytest

from configs import gsm8k_chain
from open_agentrl_jax.data.conversations import read_conversations
from open_agentrl_jax.data.prompts import read_tasks
from open_agentrl_jax.data.rows import read_table
from open_agentrl_jax.run.policy import create_model
from tests.launch.runs import ROOT, environment, lines

PAGE = (ROOT / "docs" / "data.md").read_text()
COMMANDS = re.findall(r"^python -m launch\.(\w+)( \$CHAIN.*)$", PAGE, re.MULTILINE)
WORDS = re.findall(r'^(TEACHER|START)="(.*?)"', PAGE, re.MULTILINE)


def loss_of(run):
    return [line["loss"] for line in lines(run) if line["phase"] == "sft"]


def question(a, b):
    """A problem that a model without any skill solves half of the time, once it knows what an answer looks like."""
    text = f"Ann has {a} and Ben {b}. Is Ann ahead? Say 1 or 0."  # short: contaminated only where it is the same
    return {"question": text, "answer": f"In all <<{a}+{b}={a + b}>>{a + b}.\n#### {int(a > b)}"}  # no help


def run_commands(root):
    """Runs them below `root`; returns what each said, and the words that the shell was given."""
    pairs = [(a, b) for a in range(10, 40) for b in range(10, 40) if a != b]
    random.Random(0).shuffle(pairs)
    rows = [json.dumps(question(a, b)) + "\n" for a, b in pairs]
    contest = [json.dumps({"problem": question(*pair)["question"], "answer": "1"}) + "\n" for pair in pairs[60:64]]
    for name, part in (("train", rows[:48]), ("test", rows[44:52]), ("aime", contest)):  # four of train are in test
        (root / f"{name}.jsonl").write_text("".join(part))
    config = gsm8k_chain.get_config()
    config.model.new.hidden_size, config.model.new.num_layers = 64, 2
    create_model(config, root / "model")
    tiny = {
        "model.path": root / "model", "data.train": root / "train.jsonl", "data.eval": f"gsm8k={root / 'test.jsonl'}",
        "sft.steps": 50, "sft.batch_size": 8, "sft.optim.lr": 5e-3, "rl.steps": 2, "rl.prompts": 4, "rl.samples": 4,
        "agent.max_prompt": 128, "agent.max_response": 96, "sft.max_length": 224, "rollout.slots": 16,
        "rollout.concurrency": 16, "eval.samples": 2,
    }  # fmt: skip
    given = {"OUT": str(root / "out")}
    for name, text in WORDS:
        given[name] = text.replace("$OUT", given["OUT"])
    given["CHAIN"] = " ".join(
        ["--config=configs/gsm8k_chain.py", *(f"--config.{name}={value}" for name, value in tiny.items())]
    )
    said = []
    for name, rest in COMMANDS:
        line = f"{sys.executable} -m launch.{name} {rest.replace('aime_2025.jsonl', str(root / 'aime.jsonl'))}"
        done = subprocess.run(
            ["sh", "-c", line], cwd=ROOT, env=environment() | given, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, (name, rest, done.stderr[-3000:])
        said.append(done.stdout)
    return said, given


def test_the_page_names_the_commands():
    names = [name for name, _ in COMMANDS]
    assert names == ["collect", "sft", *("collect", "sft", "curate", "train", "evaluate")]
    assert [name for name, _ in WORDS] == ["TEACHER", "START"]


def warmed_up(root, said, given):
    card = json.loads((root / "out/stitched/card.json").read_text())
    assert card["trajectories"] == {"tries": 44, "duplicate": 0, "contaminated": 0, "over_size": 0, "kept": 44}
    for conversation in read_conversations(root / "out/stitched/sft.parquet"):
        user, call, tool, answer = conversation.messages
        a, b = map(int, re.findall(r"\d\d", user.content))
        assert call.tool_calls[0].arguments == {"code": f"print({a}+{b})"} and tool.content == str(a + b)
        assert call.content == "In all" and answer.content.endswith(f"\nThe answer is \\boxed{{{int(a > b)}}}.")
    assert loss_of(root / "out/warm")[-1] < 0.2 * loss_of(root / "out/warm")[0]


def collected(root, said, given):
    card = json.loads((root / "out/collected/card.json").read_text())
    problems, counts = card["problems"], card["trajectories"]
    assert (problems["read"], problems["contaminated"], problems["used"]) == (48, 4, 44)
    assert card["made"]["teacher"] == str(root / "out/warm/export")
    assert counts["tries"] == 4 * 44 == sum(count for name, count in counts.items() if name != "tries")
    kept = read_conversations(root / "out/collected/sft.parquet")
    assert len(kept) == counts["kept"] >= problems["solved"] - counts["empty_turn"] > 0 < counts["wrong"]
    held_out = {json.loads(line)["question"] for line in (root / "test.jsonl").read_text().splitlines()}
    truth = {t.messages[0].content: t.answer for t in read_tasks(root / "train.jsonl", format="bare")}
    for conversation in kept:
        user, *turns = conversation.messages
        assert user.content in truth and user.content not in held_out and conversation.tools
        assert f"\\boxed{{{truth[user.content]}}}" in turns[-1].content  # right, whatever led to it
        assert [m.role for m in turns] == ["assistant", "tool"] * (len(turns) // 2) + ["assistant"]


def trained_on_it(root, said, given):
    losses = loss_of(root / "out/sft")
    assert len(losses) == 20 and losses[-1] < losses[0] < 0.5 * loss_of(root / "out/warm")[0]  # it went on from warm
    assert (root / "out/sft/export/model.safetensors").exists()


def curated(root, said, given):
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
    first = {t.messages[0].content: t.answer for t in read_tasks(root / "train.jsonl", format="bare")}
    assert all(first[t.messages[0].content] == t.answer for t in read_tasks(folder / "rl.parquet", format="bare"))
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


def reinforced_and_evaluated(root, said, given):
    rl = [line for line in lines(root / "out/rl") if line["phase"] == "rl"]
    assert [line["step"] for line in rl] == [1, 2] and all(line["actor/skipped"] == 0 for line in rl)
    kept = {t.id for t in read_tasks(root / "out/curated/rl.parquet")}
    played = {t["problem_id"] for t in lines(root / "out/rl", "trajectories.jsonl") if t["phase"] == "rl"}
    assert played <= kept
    figures = json.loads((root / "out/aime_2025.json").read_text())
    assert figures["mode"] == "agentic" and figures["model"].endswith("out/rl/export")
    assert figures["episodes"] == {"all": 8, "graded": 8, "aborted": 0} and len(figures["problems"]) == 4
    assert {p["id"].split("/")[0] for p in figures["problems"]} == {"aime_2025"}
    assert "aime_2025" in said[-1] and "agentic" in said[-1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_and_every_file_between_them(tmp_path):
    said, given = run_commands(tmp_path)
    for check in (warmed_up, collected, trained_on_it, curated, reinforced_and_evaluated):
        check(tmp_path, said, given)
