"""Every hostile program, at every level that this machine offers, as root and as an ordinary user."""

from __future__ import annotations

import json
import os

import pytest

from open_agentrl_jax.sandbox import probes
from open_agentrl_jax.sandbox.executor import Embedded
from tests.sandbox import hosts
from tests.sandbox.cunning import CUNNING
from tests.sandbox.edges import EDGES
from tests.sandbox.hostile import ATTACKS


async def offered(plan) -> bool:
    async with Embedded(plan) as sandbox:
        found = await probes.attack(sandbox)
    return found.holds


def test_there_are_a_hundred_and_none_twice():
    attacks = [*ATTACKS, *CUNNING, *EDGES]
    assert len({attack.name for attack in attacks}) == len(attacks) >= 140


@pytest.mark.parametrize("name", hosts.PLANS)
async def test_contained(name):
    plan = hosts.PLANS[name]
    if plan.only_root and os.geteuid() != 0:
        pytest.skip("needs root")
    if not await offered(plan):
        pytest.skip("this machine does not offer it to this user")
    assert await hosts.assault(plan) == []


@pytest.mark.parametrize("name", [name for name, plan in hosts.PLANS.items() if not plan.only_root])
def test_contained_as_an_ordinary_user(name):
    if os.geteuid() != 0:
        pytest.skip("already one")
    command = hosts.ordinary_command()
    if command is None:
        pytest.skip("no interpreter here that an ordinary user may start")
    done = hosts.as_ordinary([*command, name])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_something_isolates_here():
    sandbox, findings = probes.survey()
    if sandbox is None:
        pytest.skip("; ".join(f"{found.plan.name}: {found.why_not}" for found in findings))
    sandbox.stop()
    assert sandbox.plan.level in "AB"
