"""Concrete parts out of a Config: model, chat, who plays. Data is launch/data.py's, what is played in world.py's."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from launch.world import World
from open_agentrl_jax.agent import episode
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.behaviour import BEHAVIOURS, Behaviour
from open_agentrl_jax.config import Config, Packing, fingerprint, to_dict
from open_agentrl_jax.data import synthetic
from open_agentrl_jax.models import hf, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.parallel import processes, sharding
from open_agentrl_jax.parallel.mesh import make_mesh
from open_agentrl_jax.rewards.shaping import overlong_penalty, turn_bonus
from open_agentrl_jax.rollout.engine import Engine
from open_agentrl_jax.rollout.scheduler import EventLoop, Play, play_all
from open_agentrl_jax.types import Group, Sampling, Task, Trajectory, UserError


@dataclasses.dataclass
class Folder:
    """Where a model lies, and its tokenizer; its weights are not read yet."""

    path: Path
    tokenizer_path: Path  # the folder whose tokenizer exports carry
    tokenizer: Any


@dataclasses.dataclass
class Policy:
    """The model on its mesh, with its tokenizer."""

    tokenizer_path: Path
    config: ModelConfig
    params: Any
    mesh: jax.sharding.Mesh | None  # None: one device
    tokenizer: Any


def claim_directory(config: Config) -> Path:
    """The run directory, created and marked with the config; refused where another config's run lies there."""
    directory = Path(config.directory).absolute()
    mark = directory / "config.json"
    if mark.exists():
        theirs = json.loads(mark.read_text())
        if theirs["fingerprint"] != fingerprint(config):
            changed = ", ".join(_differences(json.loads(theirs["fingerprint"]), json.loads(fingerprint(config))))
            raise UserError(f"{mark}: the run there has another config ({changed}); give another run_dir, or remove it")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"config": to_dict(config), "fingerprint": fingerprint(config)}, indent=1)
        write_atomically(mark, text)
    return directory


@contextlib.contextmanager
def undone_if_refused(directory: Path) -> Iterator[None]:
    """Where a user's mistake ends the command before anything was trained, what it made here goes.

    Else the command with the mistake mended would be another config than the one that the directory is claimed for.
    """
    new = not directory.exists()
    before = set(os.listdir(directory)) if directory.is_dir() else set()
    try:
        yield
    except UserError:
        if processes.first() and not (directory / "metrics.jsonl").exists():
            for name in {"init", "init.tokenizer"} - before:
                shutil.rmtree(directory / name, ignore_errors=True)
            for name in {"config.json", "sft.parquet"} - before:
                (directory / name).unlink(missing_ok=True)
            for empty in (directory / "checkpoints", directory) if new else ():
                with contextlib.suppress(OSError):
                    empty.rmdir()
        raise


def write_atomically(path: Path, text: str) -> None:
    """The whole text or nothing."""
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(text)
    os.replace(temporary, path)


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in sorted({*a, *b}) for d in _differences(a.get(key), b.get(key), f"{prefix}.{key}")]
    return [] if a == b else [f"{prefix.lstrip('.')}: {a!r} there, {b!r} here"]


def mesh_of(config: Config) -> jax.sharding.Mesh | None:
    """The mesh of the config; None on one device, where nothing is ever laid out anew, and less is compiled."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    return None if mesh.size == 1 else mesh


def open_folder(config: Config, directory: Path) -> Folder:
    """The folder of `model.path`, or of the `model.new` one, created under the run directory first."""
    path = Path(config.model.path) if config.model.path else directory / "init"
    if not config.model.path:
        processes.first_then_all(lambda: (path / "config.json").exists() or create_model(config, path))
    resolved = hf.resolve(path, weights=False)
    if (resolved / "export" / "config.json").exists():
        raise UserError(f"{path}: a run, not a model; give its {path / 'export'}")
    return Folder(path, *load_tokenizer(config.model.tokenizer or str(resolved)))


def load_policy(config: Config, folder: Folder) -> Policy:
    """Reads the weights onto the mesh of the config."""
    mesh = mesh_of(config)
    dtype = config.model.compute_dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if mesh is not None:
        jax.set_mesh(mesh)
    model_config, params = hf.load_pretrained(hf.resolve(folder.path), mesh, "float32")
    how = {"compute_dtype": dtype, "remat": config.model.remat, "attention": config.model.attention}
    model_config = dataclasses.replace(model_config, **how)
    if len(folder.tokenizer) > model_config.vocab_size:
        raise UserError(
            f"{folder.tokenizer_path}: the tokenizer has {len(folder.tokenizer)} tokens, the model's vocab_size is "
            f"{model_config.vocab_size}; use the tokenizer that belongs to the model"
        )
    return Policy(folder.tokenizer_path, model_config, params, mesh, folder.tokenizer)


def load_tokenizer(source: str) -> tuple[Path, Any]:
    """The tokenizer of a folder or Hub id, and the folder that its files lie in; weights beside it are not fetched."""
    from transformers import AutoTokenizer

    folder = hf.resolve(source, weights=False)
    try:
        return folder, AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"model.tokenizer={source}: {' '.join(str(error).split())[:300]}") from error


def create_model(config: Config, path: Path) -> None:
    """Writes a seed-initialised model, with its tokenizer, as a Hugging Face folder."""
    new = config.model.new
    if config.model.tokenizer:
        tokenizer = load_tokenizer(config.model.tokenizer)[1]
    else:
        tokenizer = synthetic.train_tokenizer(synthetic.corpus(config.seed))
    saved = path.with_name(path.name + ".tokenizer")
    tokenizer.save_pretrained(saved)
    sizes = dataclasses.asdict(new) | {"vocab_size": new.vocab_size or -(-len(tokenizer) // 64) * 64}
    sizes["num_hidden_layers"] = sizes.pop("num_layers")
    sizes["num_attention_heads"] = sizes.pop("num_heads")
    sizes["num_key_value_heads"] = sizes.pop("num_kv_heads")
    hf_config = {"eos_token_id": tokenizer.eos_token_id, "hidden_act": "silu", "rms_norm_eps": 1e-6, **sizes}
    model_config = ModelConfig.from_hf(hf_config)
    params = qwen.init(model_config, config.seed)
    hf.save_pretrained(path, model_config, params, dtype="float32", tokenizer_from=saved)


def seed_of(*parts: Any) -> int:
    """31 bits that depend on all parts and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4]) >> 1


def shape_reward(trajectory: Trajectory, config: Config, behaviour: Behaviour) -> None:
    """Adds turn bonus and overlong penalty to the raw score; accuracy stays."""
    reward, metrics = config.reward, trajectory.metrics
    rounds = sum(bool(turn.tool_outputs) for turn in trajectory.turns)
    score = trajectory.reward
    if not behaviour.turn_bonus_dead:
        score = turn_bonus(score, 1 + len(trajectory.turns) + rounds, mode=reward.turn_bonus)
    length = metrics["response_length"] - (0 if reward.count_tool_tokens else metrics["tool_tokens"])
    penalty = overlong_penalty(
        int(length),
        max_length=config.agent.max_response,
        buffer=reward.overlong_buffer,
        factor=reward.overlong_factor,
    )
    metrics |= {"score": trajectory.reward, "overlong_penalty": penalty}
    trajectory.reward = score + penalty


@dataclasses.dataclass
class Player:
    """Plays episodes of one run with one way of sampling."""

    config: Config
    engine: Engine
    chat: Chat
    world: World
    sampling: Sampling
    phase: str

    async def __call__(self, task: Task, *, position: int, sample: int, attempt: int) -> Trajectory:
        """One episode; what it draws depends on seed, phase, position, sample and attempt alone."""
        config, agent = self.config, self.config.agent
        behaviour = BEHAVIOURS[config.behaviour]
        session = f"{self.phase}-{position}-{sample}-{attempt}"
        environment = self.world.environment(
            shorten=shortener(self.chat, agent.max_tool_tokens, behaviour), session=session
        )
        trajectory = await episode.run(
            self.engine,
            environment,
            self.chat,
            task,
            dataclasses.replace(self.sampling, seed=seed_of(config.seed, self.phase, position, sample, attempt)),
            episode.Budget(agent.max_turns, agent.max_response, agent.seconds),
            session=session,
            unreadable_call_ends=behaviour.first_call_only,
        )
        if not trajectory.aborted:
            shape_reward(trajectory, config, behaviour)
        return trajectory


def play_through(
    player: Play,
    tasks: Sequence[Task],
    samples: int,
    concurrency: int,
    loop: EventLoop,
    bar: Callable[[int, int], None],
    check: Callable[[], None] = lambda: None,
) -> list[Group]:
    """Every task `samples` times; `bar` is told (episodes done, of how many), `check` may raise to end it."""
    done = 0

    def on_episode() -> None:
        nonlocal done
        done += 1
        bar(done, len(tasks) * samples)

    playing = play_all(player, tasks, samples=samples, concurrency=concurrency, on_episode=on_episode)
    return loop.run(playing, check)


def shortener(chat: Chat, max_tokens: int, behaviour: Behaviour) -> Callable[[str], str]:
    """Cuts a tool's output to its budget."""
    characters = behaviour.tool_output_characters
    if not characters:
        return functools.partial(chat.shorten, max_tokens=max_tokens)

    def cut(text: str) -> str:
        half = characters // 2
        return text if len(text) <= characters else f"{text[:half]}...(truncated)...{text[-half:]}"

    return cut


def make_chat(config: Config, tokenizer: Any, schemas: Sequence[dict[str, Any]]) -> Chat:
    """The tokenizer's template, with the schemas of the tools (see World)."""
    return Chat(tokenizer, schemas, omit_newline=BEHAVIOURS[config.behaviour].newline_omitted)


def packing(config: Config, longest: int, mesh: jax.sharding.Mesh | None) -> Packing:
    """Rows and length of a micro-batch on this mesh, for sequences of at most `longest` tokens.

    Raises:
        UserError: the mesh does not divide them.
    """
    groups, parts = (1, 1) if mesh is None else (sharding.ways(axes, mesh) for axes in sharding.HIDDEN[:2])
    rows, length = config.packing.rows or groups, config.packing.length or -(-longest // parts) * parts
    if rows % groups:
        raise UserError(
            f"packing.rows={rows} does not divide by mesh data x fsdp = {groups}; use a multiple, or 0 for one a device"
        )
    if length % parts:
        raise UserError(f"packing.length={length} does not divide by mesh seq x tensor = {parts}; use a multiple, or 0")
    return Packing(rows, length)
