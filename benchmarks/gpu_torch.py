"""The sides of launch.benchmark gpu in torch: its packed attention, and transformers' update.

"varlen" is the FlashAttention that torch itself ships for sequences packed end to end, given to transformers as an
attention of its own; "flash_attention_2" is that of the package flash-attn; "sdpa" takes one sequence at a time, which
is its fast causal path and pads nothing. As here: float32 masters under bfloat16 autocast, rematerialised layers, the
head in chunks, fused AdamW.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu import Work, attention_flops, one_row
from benchmarks.harness import GIB, timed

CHUNK = 1024  # tokens of the head at once


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def varlen(q: Any, k: Any, v: Any, ends: Any, longest: int) -> Any:
    """Causal attention within sequences end to end: q [t h D], k and v [t k D], `ends` [n+1] from 0."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )  # until torch 2.10
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:  # older kernels want as many heads of keys as of queries; the copies are part of their time
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return varlen_attn(q, k, v, ends, ends, longest, longest, **options)


def attention_part(work: Work, side: str) -> list[dict[str, Any]]:
    """Forward and gradient on the row that the backends here get, its padding left out."""
    import torch

    segments, shape = one_row(work).segment_ids[0, 0], work.shape
    sizes = np.bincount(segments)[1:]
    ends = torch.tensor(np.r_[0, sizes.cumsum()], dtype=torch.int32, device="cuda")
    heads = [shape[n] for n in ("num_heads", "num_kv_heads", "num_kv_heads", "num_heads")]
    make = torch.randn(int(sizes.sum()), sum(heads), shape["head_dim"], dtype=torch.bfloat16, device="cuda")
    q, k, v, weight = (x.contiguous() for x in make.split(heads, dim=1))
    for x in (q, k, v):
        x.requires_grad_()

    def run() -> None:
        (varlen(q, k, v, ends, int(sizes.max())) * weight).sum().backward()
        _wait()

    row = timed(run, work.rounds)
    return [{"side": f"torch {side}", **row, "tflops": attention_flops(segments, work) / row["seconds"] / 1e12}]


def _model(work: Work, kind: str) -> Any:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape = work.shape
    settings: dict[str, Any] = {
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "num_key_value_heads": shape["num_kv_heads"],
        "tie_word_embeddings": shape["tie_word_embeddings"],
        "attn_implementation": kind,
    }
    torch.manual_seed(0)
    with torch.device(_device()):
        if shape["model_type"] == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(head_dim=shape["head_dim"], **settings))
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**settings))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _register_varlen() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, ends: Any = None, longest: int = 0, **_: Any) -> Any:
        # From [1 h t D]. Autocast leaves the norms and rotated q and k in float32, which the kernel does not take.
        q, k, v = (x[0].transpose(0, 1).to(v.dtype) for x in (q, k, v))
        return varlen(q, k, v, ends, longest)[None], None

    AttentionInterface.register("varlen", attend)
    AttentionMaskInterface.register("varlen", lambda *_, **__: None)


def packed(work: Work) -> list[list[np.ndarray]]:
    """The sequences in rows of --length tokens, as they are packed here."""
    from open_agentrl_jax.train.packing import first_fit_decreasing

    rows = work.rows
    return [[rows[i] for i in members] for members in first_fit_decreasing([len(r) - 1 for r in rows], work.length)]


def train_part(work: Work, side: str) -> list[dict[str, Any]]:
    """transformers' model and torch's AdamW."""
    import torch
    from torch.utils.checkpoint import checkpoint

    if side == "varlen":
        _register_varlen()
    model, device = _model(work, side), _device()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
    rows = [[row] for row in work.rows] if side == "sdpa" else packed(work)
    total = work.useful

    def head(hidden: Any, targets: Any) -> Any:
        return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), targets, reduction="sum")

    def loss(row: list[np.ndarray]) -> Any:
        sizes = [len(ids) - 1 for ids in row]
        tokens = torch.from_numpy(np.concatenate([ids[:-1] for ids in row])).long().to(device)
        targets = torch.from_numpy(np.concatenate([ids[1:] for ids in row])).long().to(device)
        positions = torch.cat([torch.arange(n, device=device) for n in sizes])[None]
        ends = torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32, device=device)
        extra = {"ends": ends, "longest": max(sizes)} if side == "varlen" else {}
        hidden = model.model(input_ids=tokens[None], position_ids=positions, use_cache=False, **extra)[0][0]
        parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        return sum(checkpoint(head, h, t, use_reentrant=False) for h, t in parts)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        for row in rows:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                share = loss(row) / total
            share.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _wait()

    row = timed(run, work.rounds)
    peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else 0.0
    return [{"side": f"torch {side}", **row, "tokens/s": total / row["seconds"], "GiB": peak, "rows": len(rows)}]


PARTS: dict[str, Callable[[Work, str], list[dict[str, Any]]]] = {"attention": attention_part, "train": train_part}

if __name__ == "__main__":
    _, part, side, given = sys.argv[1:5]
    print(json.dumps(PARTS[part](Work(**json.loads(given)), side)))
