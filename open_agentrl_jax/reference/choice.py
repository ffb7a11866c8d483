"""The published code grades multiple choice as mathematics: the last box must equal the letter as a string."""

from open_agentrl_jax.reference.math import grade as grade
