"""One of two processes with two devices each: packs its share of a mini-batch. Arguments: rank, port, folder.

Prints, for each case, the used micro-batches and a number over all tokens that no division of the work may change.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from open_agentrl_jax.config import Packing
from open_agentrl_jax.parallel import processes
from open_agentrl_jax.parallel.mesh import initialize_distributed, make_mesh
from open_agentrl_jax.parallel.sharding import placer
from open_agentrl_jax.train.packing import Example
from open_agentrl_jax.train.shares import exchanged, pack_share, rows_of

# Tokens per example of each process; sizes of the mesh.
CASES = {
    "even": ([[9, 5], [8, 4]], {"fsdp": 4}),
    "uneven": ([[9] * 12, [9, 3]], {"fsdp": 4}),
    "idle": ([[9, 8, 9], []], {"fsdp": 2, "tensor": 2}),
    "rows across processes": ([[9, 5], [8]], {"fsdp": 1, "seq": 4}),
}


def examples(lengths, seed):
    rng = np.random.default_rng(seed)
    return [
        Example(
            rng.integers(1, 99, n).astype(np.int32),
            rng.random(n) < 0.7,
            float(rng.normal()),
            rng.normal(size=n).astype(np.float32),
        )
        for n in lengths
    ]


def figure(batch):
    """Depends on every stream and on which token is beside which, and on nothing else."""
    streams = batch.advantages + batch.rollout_logprobs * batch.positions
    return (jnp.where(batch.mask, streams * (batch.tokens + 7 * batch.targets), 0)).sum()


def main(rank, port, folder):
    initialize_distributed(f"localhost:{port}", 2, int(rank))
    mine = np.arange(3 * int(rank), dtype=np.int64).reshape(-1, 3)
    assert processes.gather(mine).tolist() == [[0, 1, 2]]
    table = np.array([(int(rank), 2**40)] * (5 - int(rank)), [("a", "?"), ("b", "i8")])
    assert processes.gather(table).tolist() == [(False, 2**40)] * 5 + [(True, 2**40)] * 4
    processes._MOST = 100  # bytes: several messages
    long = np.arange(70, dtype=np.float64) + int(rank)
    assert processes.gather(long).tolist() == [*np.arange(70.0), *np.arange(70.0) + 1]
    for name, (lengths, sizes) in CASES.items():
        mesh = make_mesh(**sizes)
        with jax.set_mesh(mesh):
            rows = rows_of(mesh, 4)
            made = examples(lengths[int(rank)], int(rank))
            batch, used, useful = pack_share(made, Packing(4, 8), rows, micro_batches=6)
            placed = placer(mesh, rows.mine, rows=4)(batch)
            value = jax.jit(figure, out_shardings=jax.NamedSharding(mesh, jax.P()))(placed)
            print(f"{name}|{used}|{useful:.6f}|{float(value):.4f}", flush=True)
    np.save(pathlib.Path(folder) / f"{rank}.npy", np.concatenate([e.tokens for e in exchanged(made)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
