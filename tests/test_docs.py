"""What the documents say is so: links lead somewhere, commands and fields exist, examples run."""

import importlib.util
import itertools
import json
import pathlib
import re
import shlex
import string
import subprocess
import sys
import types

import pytest
from markdown_it import MarkdownIt

from launch import reference
from open_agentrl_jax.config import Config, lookup

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("third_party/*/README.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_renders_as_it_was_meant(page):
    """One title, no heading a level too deep, tables whose rows have as many cells as their head, no open fence."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text())
    levels = [int(token.tag[1]) for token in tokens if token.type == "heading_open"]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    lines = page.read_text().splitlines()
    for token in tokens:
        if token.type == "table_open":
            rows = [re.sub(r"\\\|", "", line) for line in lines[slice(*token.map)]]
            assert len({row.strip().strip("|").count("|") for row in rows}) == 1, f"{page}:{token.map[0] + 1}"
        if token.type == "inline" and "|--" in token.content:
            raise AssertionError(f"{page}:{token.map[0] + 1}: a table that is none")
        if token.type == "fence":
            assert lines[token.map[1] - 1].strip() == token.markup, f"{page}:{token.map[0] + 1}: an open fence"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_configs_and_fields_exist(page):
    text = page.read_text()
    for module in re.findall(r"python -m (launch\.\w+)", text):
        assert importlib.util.find_spec(module), f"{page}: {module}"
    for config in re.findall(r"\bconfigs/\w+\.py\b", text):
        assert (ROOT / config).exists(), f"{page}: {config}"
    for field in re.findall(r"--config\.([a-z_]+(?:\.[a-z_]+)*)", text):
        lookup(Config(), field)


def documented_commands():
    """(page, line, arguments) of every `python -m launch...` with any in the documents, variables filled in."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        variables = {name: value.strip('"') for name, value in re.findall(r'\b([A-Z]+)=("[^"]*"|[\w/.]+)', text)}
        for line in re.findall(r"python -m (launch\.\w+ [^`\n;#]*)", text):
            for _ in range(3):  # a variable may hold another
                line = string.Template(line).safe_substitute(variables)
            line = line.replace("<topology>", "v5p:2x2x1").replace("<model>", "qwen3_4b").replace("[--all]", "--all")
            yield page.name, line, shlex.split(line.removesuffix("...").removesuffix("|"))


def test_documented_commands_are_understood():
    commands = list(documented_commands())
    assert len(commands) > 30
    wanted = json.dumps([arguments for _, _, arguments in commands])
    command = [sys.executable, "-m", "tests.documented_commands"]
    done = subprocess.run(command, input=wanted, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    told = zip(commands, json.loads(done.stdout), strict=True)
    assert not [f"{page}: {line}: {refusal}" for (page, line, _), refusal in told if refusal]


# What a documented command looks like -> the test that runs it, smaller. The first pattern found counts.
RUN_BY = (
    (r"launch\.\w+ \S*gsm8k_chain", "tests/launch/test_chain.py"),
    (r"launch\.benchmark sandbox --url", "tests/benchmarks/test_benchmarks.py"),
    (r"launch\.benchmark (decode|memory|sandbox|scaling|train)\b", "tests/benchmarks/test_benchmarks.py"),
    (r"launch\.benchmark (refit|rollout)", "tests/rollout/test_benchmark_rollout.py"),
    (r"launch\.benchmark gpu", "tests/benchmarks/test_gpu.py"),  # part by part, on a CPU
    (r"launch\.chat", "tests/serve/test_chat.py"),
    (r"launch\.collect", "tests/collect/test_collect.py"),
    (r"launch\.compile", "tests/launch/test_compile.py"),
    (r"launch\.convert", "tests/launch/test_convert.py"),
    (r"launch\.curate", "tests/collect/test_curate.py"),
    (r"launch\.doctor", "tests/run/test_doctor.py"),
    (r"launch\.evaluate", "tests/launch/test_evaluate.py"),
    (r"launch\.report", "tests/telemetry/test_report.py"),
    (r"launch\.sandbox", "tests/sandbox/test_server.py"),
    (r"launch\.sft", "tests/launch/test_train.py"),
    (r"launch\.train \S*quickstart\.py", "tests/launch/test_train.py"),
    (r"launch\.train \S*quickstart_harness", "tests/launch/test_harness.py"),
    (r"launch\.train \S*quickstart_sglang", "tests/rollout/test_sglang_run.py"),
    (r"launch\.train \S*gsm8k_smoke", "tests/launch/test_gsm8k.py"),
    (r"launch\.train \S*qwen3_4b_grpo_tcr", "tests/launch/test_compile.py"),  # its update, which no CPU could run
)


def test_every_documented_command_is_run_by_a_test():
    lines = {line for _, line, _ in documented_commands()}
    found = {line: next((shape for shape, _ in RUN_BY if re.search(shape, line)), None) for line in lines}
    assert not [line for line, shape in found.items() if shape is None]
    assert set(found.values()) == {shape for shape, _ in RUN_BY}  # nothing is listed that no page says
    assert all((ROOT / test).is_file() for _, test in RUN_BY)


def test_the_reference_is_up_to_date():
    told = "docs/config.md is not what config.py says: run python -m launch.reference"
    assert (ROOT / "docs/config.md").read_text() == reference.text(), told


def test_the_import_graph_is_up_to_date():
    spec = importlib.util.spec_from_file_location("import_graph", ROOT / "docs/import_graph.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text()
    assert page == module.replace(page), "run python docs/import_graph.py --write"


def test_every_field_is_in_the_reference():
    text = reference.text()
    for field in ("seed", "rl.loss.clip_high", "sft.optim.lr", "model.new.hidden_size", "telemetry.tensorboard"):
        assert f"| `{field}` | `{lookup(Config(), field)!r}` |" in text
    assert "| token, sequence | sequence: GSPO |" in text


def test_the_examples_of_extending_run(monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), flags=re.S)
    assert len(blocks) >= 5
    module = types.ModuleType("extending")  # the page says that its code lies in extending.py
    monkeypatch.setitem(sys.modules, "extending", module)
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/extending.md, block {number + 1}", "exec"), vars(module))


def test_every_message_of_troubleshooting_is_still_told():
    # Messages are put together over several lines of code: strings are joined as Python would.
    files = [*ROOT.glob("open_agentrl_jax/**/*.py"), *ROOT.glob("launch/*.py")]
    code = "\n".join(re.sub(r'["\']\s*\n\s*f?["\']', "", file.read_text()) for file in files)
    headings = re.findall(r"^## `(.*)`$", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.M)
    assert len(headings) >= 10
    for heading in headings:
        assert heading in code, heading


def test_the_version_is_one():
    (version,) = re.findall(r'version="([\d.]+)"', (ROOT / "setup.py").read_text())
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert version in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
