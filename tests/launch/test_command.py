"""What every command shares: its help, the config's file, and a mistake that leaves nothing behind."""

import socket
import subprocess
import sys

import pytest

from configs import quickstart
from launch import command, report
from launch.command import Parser
from open_agentrl_jax.config import Config
from open_agentrl_jax.run.directory import claim_directory, undone_if_refused
from open_agentrl_jax.run.policy import create_model, load_tokenizer, open_folder
from open_agentrl_jax.types import UserError

from .runs import ROOT, environment, run


def test_help_lists_the_flags_of_ours_wherever_they_are_defined():
    for name, flags in {"train": ["--config"], "evaluate": ["--config", "--compare", "--[no]tools"]}.items():
        done = subprocess.run(
            [sys.executable, "-m", f"launch.{name}", "--help"],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and not done.stderr
        assert all(f"  {flag}:" in done.stdout for flag in flags)


def test_a_config_of_ours_is_found_from_any_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command._find_config("--config=configs/quickstart.py") == f"--config={ROOT}/configs/quickstart.py"
    assert command._find_config("--config.rl.steps=3") == "--config.rl.steps=3"
    separate = ["train", "--config", "configs/quickstart.py", "--config.seed=1"]
    assert command._with_config_found(separate) == [
        "train",
        f"--config={ROOT}/configs/quickstart.py",
        "--config.seed=1",
    ]
    (tmp_path / "mine.py").touch()
    assert command._find_config("--config=mine.py:small") == "--config=mine.py:small"
    with pytest.raises(SystemExit) as ended:
        command._find_config("--config=configs/quickstrat.py")
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and "no such file" in told and " quickstart," in told


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--config.rl.stepss=3", "--config.rl.stepss: no such field; did you mean --config.rl.steps? docs/config.md"),
        ("--config.zzz=3", "--config.zzz: no such field; docs/config.md"),
        ("--config.rl.steps=abc", "flag --config.rl.steps=abc: invalid literal"),
        ("--confi=3", "Unknown command line flag 'confi'"),
    ],
)
def test_a_mistyped_flag_is_told_in_one_line(argument, told):
    flags = ["--config=configs/quickstart.py", argument]
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", *flags], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {told}") and done.stderr.count("\n") == 1


def test_commands_without_a_config_tell_a_mistake_in_one_line_too(capsys):
    with pytest.raises(SystemExit) as ended:
        Parser().parse_args(["--nothing"])
    assert (ended.value.code, capsys.readouterr().err) == (
        2,
        "error: unrecognized arguments: --nothing (--help lists the flags)\n",
    )


def test_a_refused_first_command_leaves_the_directory_unclaimed(tmp_path):
    config = Config(name="x", run_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sft.parquet").touch()  # the user's
    with pytest.raises(UserError, match="mistake"), undone_if_refused(tmp_path / "run"):
        (claim_directory(config) / "init").mkdir()
        raise UserError("a mistake")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["sft.parquet"]
    config.seed = 1
    with pytest.raises(UserError, match="mistake"), undone_if_refused(tmp_path / "run"):
        (claim_directory(config) / "metrics.jsonl").touch()  # it has begun
        raise UserError("a mistake")
    assert (tmp_path / "run" / "config.json").exists()
    with pytest.raises(UserError, match="mistake"), undone_if_refused(tmp_path / "new"):
        config.run_dir = str(tmp_path / "new")
        (claim_directory(config) / "checkpoints").mkdir()
        raise UserError("a mistake")
    assert not (tmp_path / "new").exists()


def test_a_run_given_as_a_model_is_told_of_its_export(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").touch()
    config = Config(name="x")
    config.model.path = str(tmp_path)
    with pytest.raises(UserError, match=r"a run, not a model; give its .*/export"):
        open_folder(config, tmp_path)


def test_what_is_wrong_with_the_data_is_told_before_weights_are_read(tmp_path):
    config = quickstart.get_config()
    config.model.new.num_layers, config.model.new.hidden_size = 1, 32
    create_model(config, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    done = run("train", tmp_path / "run", **{"model.path": tmp_path / "model", "data.eval": "nowhere.jsonl"})
    assert done.returncode == 2 and "nowhere.jsonl" in done.stderr.strip().splitlines()[-1]


def test_a_tokenizer_of_the_hub_comes_without_weights(monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, *, allow_patterns):
        asked.append(allow_patterns)
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match="the download from the Hub failed"):
        load_tokenizer("Qwen/Qwen3-4B")
    assert asked == [["*.json", "*.txt", "*.jinja"]]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "/data/run"), "error: /data/run: Permission denied"),
        (OSError(28, "No space left on device"), "error: No space left on device; free some space, then run"),
        (ValueError("Writing x: No space left on device [OS error 28]"), "error: No space left on device; free"),
        (KeyboardInterrupt(), "interrupted"),
        (UserError("x: y"), "error: x: y"),
    ],
)
def test_errors_of_user_and_machine_are_one_line(error, message, capsys):
    with pytest.raises(SystemExit) as ended, command.one_line_errors():
        raise error
    printed = capsys.readouterr().err
    assert ended.value.code == (130 if message == "interrupted" else 2)
    assert printed.splitlines()[-1].startswith(message)


def test_other_errors_keep_their_traceback():
    with pytest.raises(FileNotFoundError), command.one_line_errors():
        raise FileNotFoundError(2, "No such file", "lost.json")


def test_a_taken_port_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port in (taken.getsockname()[1], 99999):
            monkeypatch.setattr(sys, "argv", ["report", "--serve", str(tmp_path), "--port", str(port)])
            with pytest.raises(SystemExit) as ended:
                report.main()
            told = capsys.readouterr().err
            assert ended.value.code == 2 and told.startswith(f"error: port {port} at ") and told.count("\n") == 1


def test_errors_and_logs_show_no_secrets(tmp_path):
    """The message of a bad tool names it as the config does, key included."""
    code = (
        "import logging\nfrom launch import command\nfrom open_agentrl_jax.types import UserError\n"
        "from open_agentrl_jax.telemetry.screen import Screen\n"
        "def main():\n"
        "    logging.getLogger('mine').warning('server %s: try again', 'https://me:s3cret@host')\n"
        "    Screen().say('server https://me:s3cret@host')\n"
        "    raise UserError('agent.tools=mcp:npx --api-key s3cret : no such file')\n"
        "command.run(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "s3cret" not in done.stdout + done.stderr
    assert "server https://***@host: try again" in done.stderr
    assert "error: agent.tools=mcp:npx --api-key *** : no such file" in done.stderr
