"""Uploads a model folder to the Hugging Face Hub, with a model card made from its run's figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from open_agentrl_jax.models import hf
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.telemetry.index import read_config, read_metrics
from open_agentrl_jax.types import UserError

FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]
SHOWN = ("accuracy/mean", "reward/mean", "tool_calls/mean", "tool_success/mean", "response_length/mean")


def card(folder: Path, repo: str) -> str:
    """README.md of a repository: usage, held-out figures and config.

    The figures are those of the run that contains the folder; another folder gets a card without figures.
    """
    config = ModelConfig.from_hf(folder)
    run = folder.absolute().parent
    settings = read_config(run)
    base = settings.get("model", {}).get("path", "")
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"base_model: {base}"] if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", base) and not Path(base).exists() else []
    head += ["tags:", "- reinforcement-learning", "- tool-use", "- open_agentrl_jax", "---"]
    lines = [
        *head,
        "",
        f"# {repo.partition('/')[2]}",
        "",
        f"A {config.model_type} model of {config.num_layers} layers and hidden size {config.hidden_size}, trained with "
        "open_agentrl_jax to reason with a Python tool (tool calls in the Hermes format of its chat template).",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{repo}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
        "```",
        "",
        f"With its tool, in a terminal: `python -m launch.chat --model={repo}`",
        "",
    ]
    if (run / "metrics.jsonl").exists():
        lines += _figures(read_metrics(run).get("eval", {}), settings.get("data", {}).get("eval", ""))
    if settings:
        kept = {name: value for name, value in settings.items() if name not in ("run_dir", "telemetry")}
        text = json.dumps(_without_paths(kept), indent=1)
        lines += ["## Config of the run", "", "```json", text, "```", ""]
    return "\n".join(lines)


def _figures(evals: dict[str, list[Any]], data: str) -> list[str]:
    rows = [
        f"| {name} | {evals[name][0]:.3f} | {evals[name][-1]:.3f} |"
        for name in SHOWN
        if name in evals and None not in (evals[name][0], evals[name][-1])
    ]
    if not rows:
        return []
    steps = f"| | step {evals['step'][0]} | step {evals['step'][-1]} |"
    where = f", on `{Path(data).name}`" if data else ""
    return [f"## Held-out problems during the run{where}", "", steps, "|---|---|---|", *rows, ""]


def _without_paths(value: Any) -> Any:
    """Reduces absolute paths to file names, because directories belong to the machine."""
    if isinstance(value, dict):
        return {name: _without_paths(inner) for name, inner in value.items()}
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def push(folder: str | Path, repo: str) -> str:
    """Uploads the model's files and its card; creates a private repository if there is none.

    Returns:
        The address of the repository.

    Raises:
        UserError: the name is malformed, there is no token, or the Hub refuses.
    """
    import huggingface_hub

    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise UserError(f"repository {repo!r}: give owner/name")
    resolved = hf.resolve(folder)
    ModelConfig.from_hf(resolved)  # a folder without a model is refused before anything is created
    api = huggingface_hub.HfApi()
    try:
        address = str(api.create_repo(repo, private=True, exist_ok=True))
        message = "Model of open_agentrl_jax"
        api.upload_folder(repo_id=repo, folder_path=resolved, allow_patterns=FILES, commit_message=message)
        readme = card(resolved, repo).encode()
        api.upload_file(repo_id=repo, path_or_fileobj=readme, path_in_repo="README.md", commit_message="Model card")
    except Exception as error:  # offline, no token, no permission: the client raises many types
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"repository {repo}: {type(error).__name__}: {text}; log in with `hf auth login`, or set HF_TOKEN"
        ) from error
    return address
