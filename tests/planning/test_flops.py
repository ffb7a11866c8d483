import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from open_agentrl_jax.models.attention import attention
from open_agentrl_jax.planning import flops


def _of(function, *shapes):
    return flops.count(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)))


def test_a_product_counts_twice_its_multiply_adds():
    assert _of(lambda a, b: a @ b, (3, 5), (5, 7)).products == 2 * 3 * 5 * 7
    assert _of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)).products == 4 * 2 * 3 * 5 * 7


def test_loops_count_as_often_as_they_run_and_what_is_computed_again_counts_again():
    def layers(x, w):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(step, x, w)[0].sum()

    forward, product = _of(layers, (2, 8), (6, 8, 8)).products, 2 * 2 * 8 * 8
    assert forward == 6 * product
    both = _of(jax.grad(layers, argnums=(0, 1)), (2, 8), (6, 8, 8)).products
    assert both == 4 * forward  # forward, forward again, and two products a layer backward


def test_what_rematerialisation_saves_is_not_counted_again():
    """JAX leaves a call without results where all of them were saved, as those of the attention's kernel are."""
    places = jnp.arange(256)[None]

    def layer(q, k, v):
        return jnp.sin(attention(jnp.sin(q), k, v, jnp.ones_like(places), places, backend="splash")).sum()

    def products(policy):
        of_all = jax.grad(jax.checkpoint(layer, policy=policy), argnums=(0, 1, 2))
        return _of(of_all, (1, 256, 2, 32), (1, 256, 1, 32), (1, 256, 1, 32)).kernels / (2 * 256 * 256 * 2 * 32)

    policies = jax.checkpoint_policies
    assert products(policies.nothing_saveable) == 2 + 2 + 7  # forward, forward again, backward
    assert products(policies.save_only_these_names("attention")) == 2 + 7


def test_kernels_count_every_step_of_their_grid_and_branches_the_dearest():
    def kernel(a, b, o):
        @pl.when(pl.program_id(0) == 0)
        def _():
            o[...] = a[...] @ b[...]

    def run(a, b):
        spec = pl.BlockSpec((8, 8), lambda i, j: (0, 0))
        shape = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        return pl.pallas_call(kernel, grid=(3, 2), in_specs=[spec, spec], out_specs=spec, out_shape=shape)(a, b)

    assert _of(run, (8, 8), (8, 8)) == flops.Flops(0.0, 6 * 2 * 8 * 8 * 8)
