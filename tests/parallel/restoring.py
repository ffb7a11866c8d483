"""One of two processes that save, then restore while reads fail in process 1 alone. Arguments: rank, port, folder."""

import sys

import jax
import tenacity

from open_agentrl_jax.config import Optim
from open_agentrl_jax.models import qwen
from open_agentrl_jax.models.config import ModelConfig
from open_agentrl_jax.parallel.mesh import initialize_distributed, make_mesh
from open_agentrl_jax.train import checkpoint
from open_agentrl_jax.train import state as states
from open_agentrl_jax.train.checkpoint import Checkpoints, Progress
from open_agentrl_jax.train.optimizer import make_optimizer
from open_agentrl_jax.types import UserError

MODEL = ModelConfig("qwen2", 96, 64, 128, 2, 4, 2, 16)


def main(rank, port, folder):
    initialize_distributed(f"localhost:{port}", 2, int(rank))
    mesh = make_mesh(fsdp=2)
    jax.set_mesh(mesh)
    optimizer = make_optimizer(Optim(), 10)
    shardings = qwen.param_shardings(MODEL, mesh)
    params = jax.jit(lambda: qwen.init(MODEL, 0), out_shardings=shardings)()
    state = jax.jit(lambda p: states.create(p, optimizer))(params)
    abstract = {"rl": lambda: states.abstract(params, optimizer, mesh)}
    checkpoint.WAIT = tenacity.wait_none()
    load, calls = checkpoint._load, []

    def failing(times, message, only=None):
        def wrapped(path, states_):
            calls.append(path.name)
            if rank == "1" and len(calls) <= times and only in (None, path.name):
                raise OSError(message)
            return load(path, states_)

        calls.clear()
        return wrapped

    def attempt(text):
        checkpoints = Checkpoints(folder)
        try:
            restored, progress = checkpoints.restore(abstract)
            same = jax.tree.map(lambda a, b: (a == b).all(), restored.params, params)
            print(text, progress.step, len(calls), all(map(bool, jax.tree.leaves(same))), flush=True)
        except UserError as error:
            print(text, "not enough memory" in str(error), flush=True)
        checkpoints.close()

    checkpoints = Checkpoints(folder)
    for step in (30, 60):
        checkpoints.save(state, Progress("rl", step))
    checkpoints.close()
    checkpoint._load = failing(1, "Stale file handle")
    attempt("transient")
    checkpoint._load = failing(99, "RESOURCE_EXHAUSTED")
    attempt("memory")
    checkpoint._load = failing(99, "not a zarr array", only="60")  # every byte can be read: damage
    attempt("damaged")


if __name__ == "__main__":
    main(*sys.argv[1:])
