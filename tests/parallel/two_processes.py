"""One of two processes with two fake devices each: loads, computes, exports, publishes. Given: rank, port, folder."""

import pathlib
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from parallel.eight_devices import loss

from open_agentrl_jax.models import hf
from open_agentrl_jax.parallel import sharding
from open_agentrl_jax.parallel.mesh import initialize_distributed, make_mesh
from open_agentrl_jax.train import publish


def main(rank, port, folder):
    initialize_distributed(f"localhost:{port}", 2, int(rank))
    folder = pathlib.Path(folder)
    mesh = make_mesh(fsdp=2, tensor=2)
    config, params = hf.load_pretrained(folder / "model", mesh)
    mine = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards if s.replica_id == 0)
    with jax.set_mesh(mesh):
        where = jax.sharding.NamedSharding(mesh, sharding.TOKENS)
        batch = [
            jax.make_array_from_callback(x.shape, where, lambda i, x=x: x[i]) for x in np.load(folder / "batch.npy")
        ]
        value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, config, *batch)
    hf.save_pretrained(folder / "params", config, params, max_shard_bytes=20_000)
    hf.save_pretrained(folder / "gradient", config, gradient)
    publish._FILE_BYTES = 20_000  # several files: each process writes some of them
    for version in (1, 2, 3):
        publish.publish_weights(params, config, folder / "weights", version)
    publish.publish_weights(params, config, folder / f"memory-{rank}", 4, shared=False)
    np.save(folder / f"replayed-{rank}.npy", publish.replayed_logprobs(params, config, range(9)))
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    print(float(value), mine / total)


if __name__ == "__main__":
    main(*sys.argv[1:])
