"""The policy of a run: its model folder, weights on the mesh, tokenizer, chat template and packing."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from open_agentrl_jax.agent import templates
from open_agentrl_jax.agent.chat import Chat
from open_agentrl_jax.config import Config
from open_agentrl_jax.data import synthetic
from open_agentrl_jax.models import gguf, hf, lora, peft, qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.models.folders import tokenizer_files
from open_agentrl_jax.parallel import processes
from open_agentrl_jax.parallel.mesh import make_mesh
from open_agentrl_jax.reference.behaviour import BEHAVIOURS
from open_agentrl_jax.storage import read_bytes
from open_agentrl_jax.train.packing import choose_packing as choose_packing
from open_agentrl_jax.types import UserError


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
    params: Any  # what is trained: all parameters, or the adapters
    mesh: jax.sharding.Mesh | None  # None: one device
    tokenizer: Any
    frozen: Any = None  # with adapters: the base, see models/lora.py

    def whole(self, params: Any = None) -> Any:
        """All parameters, with `params` for those that are trained."""
        return lora.join(self.frozen, self.params if params is None else params)


def mesh_of(config: Config) -> jax.sharding.Mesh | None:
    """The mesh of the config; None on one device, where nothing is ever laid out anew, and less is compiled."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    return None if mesh.size == 1 else mesh


def open_folder(config: Config, directory: Path) -> Folder:
    """The folder of `model.path`; `<directory>/init`, written if missing, for a GGUF file or the new model."""
    path = Path(config.model.path)
    if not config.model.path or path.suffix == ".gguf":
        path = directory / "init"
        make = read_gguf if config.model.path else create_model
        processes.first_then_all(lambda: (path / "config.json").exists() or make(config, path))
    resolved = hf.resolve(path, weights=False)
    if (resolved / "export" / "config.json").exists():
        raise UserError(f"{path}: a run, not a model; give its {path / 'export'}")
    tokenizer_path, tokenizer = load_tokenizer(config.model.tokenizer or str(resolved))
    if config.model.template != "auto":
        templates.use(tokenizer, config.model.template)
        tokenizer_path = save_tokenizer(tokenizer, tokenizer_path, directory / "tokenizer")
    return Folder(path, tokenizer_path, tokenizer)


def compute_dtype(config: Config) -> str:
    """The compute dtype of the config; auto is float32 on CPUs and on GPUs without bfloat16 (before Ampere)."""
    if config.model.compute_dtype != "auto":
        return config.model.compute_dtype
    device = jax.local_devices()[0]
    old = device.platform == "gpu" and float(device.compute_capability) < 8
    return "float32" if device.platform == "cpu" or old else "bfloat16"


def load_policy(config: Config, folder: Folder) -> Policy:
    """Reads the weights onto the mesh of the config."""
    mesh = mesh_of(config)
    dtype = compute_dtype(config)
    if mesh is not None:
        jax.set_mesh(mesh)
    adapters = peft.adapters_of(config.model.lora)
    model_config, params = hf.load_pretrained(hf.resolve(folder.path), mesh, dtype if adapters else "float32")
    how = {name: getattr(config.model, name) for name in ("reduce_dtype", "remat", "attention", "balance")}
    how["compute_dtype"] = dtype
    model_config = dataclasses.replace(model_config, lora=adapters, **how)
    if len(folder.tokenizer) > model_config.vocab_size:
        raise UserError(
            f"{folder.tokenizer_path}: the tokenizer has {len(folder.tokenizer)} tokens, the model's vocab_size is "
            f"{model_config.vocab_size}; use the tokenizer that belongs to the model"
        )
    if adapters is None:
        return Policy(folder.tokenizer_path, model_config, params, mesh, folder.tokenizer)
    lora.check(model_config)
    start = config.model.lora.adapter
    trained = peft.load_adapter(start, model_config, mesh) if start else lora.init(model_config, config.seed, mesh)
    return Policy(
        folder.tokenizer_path, model_config, trained, mesh, folder.tokenizer, lora.freeze(params, model_config)
    )


def load_tokenizer(source: str) -> tuple[Path, Any]:
    """The tokenizer of a folder or Hub id, and the folder that its files lie in; weights beside it are not fetched."""
    from transformers import AutoTokenizer

    folder = hf.resolve(source, weights=False)
    for name in ("config.json", *tokenizer_files(folder)):  # transformers ignores some files that it cannot read
        if (folder / name).exists():
            read_bytes(folder / name)
    try:
        return folder, AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"model.tokenizer={source}: {' '.join(str(error).split())[:300]}") from error


def save_tokenizer(tokenizer: Any, source: Path, target: Path) -> Path:
    """Writes a tokenizer whose template was replaced, and the generation config of its source; exports carry both."""

    def write() -> None:
        tokenizer.save_pretrained(target)
        if (generation := source / "generation_config.json").exists():
            shutil.copy(generation, target)

    processes.first_then_all(write)
    return target


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


def read_gguf(config: Config, path: Path) -> None:
    """Writes the model and tokenizer of a GGUF file as a Hugging Face folder."""
    saved = path.with_name(path.name + ".tokenizer")
    gguf.save_tokenizer(config.model.path, saved)
    hf.save_pretrained(path, *gguf.load(config.model.path), dtype="float32", tokenizer_from=saved)


def make_chat(config: Config, tokenizer: Any, schemas: Sequence[dict[str, Any]]) -> Chat:
    """The tokenizer's template, with the schemas of the tools (see World)."""
    return Chat(tokenizer, schemas, omit_newline=BEHAVIOURS[config.behaviour].newline_omitted)
