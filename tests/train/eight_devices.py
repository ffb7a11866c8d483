"""Run in a process of its own with eight fake devices: whole updates on meshes, compared with one device."""

import dataclasses
import json

import jax
import numpy as np

from open_agentrl_jax.config import Loss, Optim
from open_agentrl_jax.models import lora, qwen
from open_agentrl_jax.models.config import Lora, ModelConfig
from open_agentrl_jax.parallel.mesh import make_mesh
from open_agentrl_jax.parallel.sharding import placer
from open_agentrl_jax.train import state as states
from open_agentrl_jax.train.optimizer import make_optimizer
from open_agentrl_jax.train.packing import pack
from open_agentrl_jax.train.step import make_score, make_step, policy_gradient
from tests.train.tiny import examples

MODEL = ModelConfig(
    "qwen3",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
    remat="full",
)
ADAPTERS = {
    "adapters": dataclasses.replace(MODEL, lora=Lora(4)),
    "adapters on 8 bits": dataclasses.replace(MODEL, lora=Lora(4, int8=True)),
}
LOSSES = {
    "token level": Loss(),
    "every term": Loss(
        kl_coef=0.1,
        entropy_coef=0.01,
        ratio="sequence",
        aggregate="seq-mean-token-sum",
        importance_level="sequence",
        importance_cap=5.0,
    ),
    "covariance": Loss(policy="kl_cov"),
    "mixture": Loss(),
}
MIXTURE = dataclasses.replace(
    MODEL, model_type="qwen3_moe", num_experts=4, experts_per_token=2, expert_size=32, remat="attention", balance=0.01
)
CASES = [
    ("token level", (2, 4, 1, 1), False),
    ("token level", (1, 2, 2, 2), False),
    ("token level", (1, 2, 2, 2), True),
    ("every term", (2, 1, 2, 2), False),
    ("covariance", (1, 4, 2, 1), False),
    ("adapters", (1, 2, 2, 2), False),
    ("adapters", (2, 2, 2, 1), False),
    ("adapters on 8 bits", (1, 2, 2, 2), False),
    ("mixture", (2, 1, 1, 2, 2), False),
]


def updated(name, mesh, offload=False):
    """Scores and the state after one update, on the host; and whether all lies where it should."""
    optimizer = make_optimizer(Optim(lr=1e-2, offload=offload), 10)
    model = ADAPTERS.get(name, MIXTURE if name == "mixture" else MODEL)
    step = make_step(model, optimizer, policy_gradient(LOSSES.get(name, Loss()), width=16), chunk=16)
    score = make_score(model, chunk=16)
    batch, used = pack(examples(24), rows=8, length=24)
    base = dataclasses.replace(model, lora=None)
    params = qwen.init(base, 0)
    if mesh is not None:
        params = jax.device_put(params, qwen.param_shardings(base, mesh))
    frozen = None
    if model.lora is not None:
        frozen = lora.freeze(params, model)
        params = jax.tree.map(lambda x: x + 0.1, lora.init(model, 0, mesh))
    state = jax.jit(lambda p: states.create(p, optimizer))(params)
    batch = placer(mesh)(batch)
    scores = score(params, batch, np.int32(used), frozen=frozen)
    state, metrics = step(state, batch, np.int32(used), frozen=frozen)
    like = states.abstract(params, optimizer, mesh)
    placed = jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s.sharding, x.ndim), state, like))
    return jax.device_get((scores, state.params, metrics)), placed


def difference(a, b):
    a, b = (np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def main():
    alone = {name: updated(name, None)[0] for name in [*LOSSES, *ADAPTERS]}
    cases = []
    for name, sizes, offload in CASES:
        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            got, placed = updated(name, mesh, offload)
        names = ("scores", "params", "metrics")
        cases.append(
            {"loss": name, "mesh": sizes, "offload": offload, "placed": placed}
            | {part: difference(a, b) for part, a, b in zip(names, got, alone[name], strict=True)}
        )
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
