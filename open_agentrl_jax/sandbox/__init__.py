"""Runs model-written Python in isolation. No JAX; useful alone. Start at `client.open_sandbox`."""
