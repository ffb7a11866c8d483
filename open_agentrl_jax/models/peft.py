"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors, written and read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from open_agentrl_jax.config import LoRA
from open_agentrl_jax.models import lora, qwen
from open_agentrl_jax.models.config import Lora, ModelConfig
from open_agentrl_jax.models.export import gather_to_host, tensors_of
from open_agentrl_jax.models.folders import check_complete, check_target, replacing, resolve
from open_agentrl_jax.models.params import TABLE, Params, abstract_params
from open_agentrl_jax.models.tensor_files import write_tensors
from open_agentrl_jax.parallel.sharding import path_name
from open_agentrl_jax.types import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Features that are not implemented: field of adapter_config.json -> the values that disable it.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "exclude_modules": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
}


def save_adapter(
    path: str | os.PathLike[str], model_config: ModelConfig, adapters: Params, *, base: str | os.PathLike[str]
) -> None:
    """Write the adapters in float32 as a folder that `peft.PeftModel.from_pretrained` loads.

    A failed export leaves an earlier one as it was. All processes must call it; the first one writes.

    Args:
      path: the folder; it may be absent, empty, or an earlier export.
      model_config: the model, with `lora`.
      adapters: sharded or not.
      base: folder or Hub id of the frozen model.

    Raises:
      UserError: `path` holds other files.
    """
    target = pathlib.Path(path)
    check_target(target)
    kind = model_config.lora
    assert kind is not None
    leaves = jax.tree_util.tree_leaves_with_path(adapters)
    tensors = [tensor for path, leaf in leaves for tensor in tensors_of(path_name(path), leaf.shape)]
    hosted = (gather_to_host(adapters, tensor, "float32") for tensor in tensors)
    arrays = [x.T if TABLE[t.path].transposed else x for t, x in zip(tensors, hosted, strict=True)]
    if jax.process_index():
        return
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": kind.rank,
        "lora_alpha": kind.alpha,
        "use_rslora": kind.rslora,
        "target_modules": sorted({tensor.name.split(".")[-3] for tensor in tensors}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with replacing(target) as folder:
        write_tensors(folder / WEIGHTS, {tensor.name: tensor.shape for tensor in tensors}, "float32", arrays)
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def read_config(path: str | os.PathLike[str]) -> tuple[Lora, str]:
    """The adapters that a PEFT folder holds, and the folder or Hub id of their base.

    Raises:
      UserError: a missing or malformed adapter_config.json, or a feature that is not implemented.
    """
    folder = resolve(path)
    file = folder / CONFIG
    try:
        content = json.loads(file.read_text())
        kind = Lora(
            rank=int(content["r"]),
            alpha=float(content.get("lora_alpha", 8)),
            targets=_targets(content.get("target_modules")),
            rslora=bool(content.get("use_rslora", False)),
        )
    except FileNotFoundError:
        raise UserError(f"{file}: missing; give the folder of a PEFT adapter") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({type(error).__name__}: {error}); copy it again") from None
    if content.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type: {content.get('peft_type')!r} is not supported; give a LORA adapter")
    for field, unused in _UNUSED.items():
        if content.get(field) not in unused:
            raise UserError(f"{file}: {field}: {content[field]!r} is not supported; use an adapter with {unused[0]!r}")
    return kind, content.get("base_model_name_or_path") or ""


def adapters_of(wanted: LoRA) -> Lora | None:
    """The adapters that a config trains; None if it trains all weights.

    Raises:
      UserError: they differ from those in the folder to continue from.
    """
    if not wanted.rank:
        return None
    made = Lora(wanted.rank, wanted.alpha, tuple(wanted.targets), wanted.rslora, wanted.base == "int8")
    if not wanted.adapter:
        return made
    found, _ = read_config(wanted.adapter)
    for field in ("rank", "alpha", "rslora"):
        if (there := getattr(found, field)) != getattr(made, field):
            raise UserError(
                f"model.lora.{field}={getattr(made, field)}, but the adapter in {wanted.adapter} has {there}; "
                f"set model.lora.{field}={there}"
            )
    if made.targets and set(made.targets) != set(found.targets):
        raise UserError(f"model.lora.targets={made.targets}, but {wanted.adapter} has {found.targets}; leave it empty")
    return dataclasses.replace(made, targets=found.targets)


def _targets(modules: Any) -> tuple[str, ...]:
    if modules == "all-linear":
        return ()
    if not isinstance(modules, list):  # PEFT takes a regular expression here
        raise ValueError(f"target_modules={modules!r} is not a list of names")
    return tuple(sorted({str(name).rsplit(".", 1)[-1] for name in modules}))


def load_adapter(
    path: str | os.PathLike[str], model_config: ModelConfig, mesh: jax.sharding.Mesh | None = None
) -> Params:
    """Read the adapters of a PEFT folder, float32, into the shardings of `mesh`.

    Args:
      path: a folder with adapter_config.json and adapter_model.safetensors, or a Hub id.
      model_config: the base model, with the `lora` of `read_config`.
      mesh: placement; None is the default device.

    Raises:
      UserError: a missing, damaged, unknown or misshaped tensor or file.
    """
    folder = resolve(path)
    check_complete(folder)
    values = _read(folder / WEIGHTS)
    wanted = lora.split(abstract_params(model_config))[1]

    def stack(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, where: Any = None) -> jax.Array:
        parts = []
        for tensor in tensors_of(path_name(path), leaf.shape):
            if tensor.name not in values:
                raise UserError(
                    f"{folder / WEIGHTS}: {tensor.name}: missing; give the adapter's own adapter_config.json"
                )
            value = values.pop(tensor.name)
            if value.shape != tensor.shape:
                raise UserError(
                    f"{folder / WEIGHTS}: {tensor.name}: shape {value.shape}, but rank and base model imply "
                    f"{tensor.shape}; give the base model that the adapter was trained on"
                )
            parts.append(value.T if TABLE[tensor.path].transposed else value)
        return jax.device_put(np.stack(parts).astype(np.float32), where)

    places = () if mesh is None else (lora.split(qwen.param_shardings(model_config, mesh))[1],)
    made = jax.tree_util.tree_map_with_path(stack, wanted, *places)
    for name in sorted(values):
        raise UserError(f"{folder / WEIGHTS}: {name}: not an adapter of a {model_config.model_type} model's layers")
    return made


def _read(file: pathlib.Path) -> dict[str, np.ndarray]:
    if not file.exists():
        raise UserError(f"{file}: missing; give the folder of a PEFT adapter with safetensors weights")
    with contextlib.suppress(SafetensorError), safe_open(file, "np") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (safe_open is no mapping)
    raise UserError(f"{file}: damaged; copy it again")
