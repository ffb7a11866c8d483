from __future__ import annotations

import asyncio

import pytest

from open_agentrl_jax.sandbox import executor


async def texts(session, *cells: str) -> list[str]:
    return [(await session.run(cell)).stdout for cell in cells]


async def test_cells_share_variables_and_sessions_do_not(sandbox):
    async with sandbox.session() as one, sandbox.session() as two:
        assert await texts(one, "x = 3\nprint('first')", "x += 1\nprint(x)") == ["first\n", "4\n"]
        other = await two.run("print(x)")
        assert (other.status, other.return_code) == ("finished", 1) and "NameError" in other.stderr
        assert one.restarts == 0


async def test_errors_and_exits_keep_the_state(sandbox):
    async with sandbox.session() as session:
        await session.run("def f(): return x / 0\nx = 7")
        failed = await session.run("f()")
        assert failed.return_code == 1 and 'File "<cell 1>", line 1, in f\n    def f(): return x / 0' in failed.stderr
        assert (await session.run("import sys; sys.exit(3)")).return_code == 3
        assert (await session.run("x = = 1")).return_code == 1
        assert await texts(session, "print(x)") == ["7\n"]
        assert session.restarts == 0


async def test_a_cell_over_its_time_is_interrupted_and_the_state_survives(sandbox):
    async with sandbox.session() as session:
        late = await session.run("x = 1\nprint('half')\nwhile True: pass", timeout=0.4)
        assert (late.status, late.stdout, late.return_code) == ("timeout", "half\n", -2)
        assert await texts(session, "print(x)") == ["1\n"]


async def test_a_cell_that_ignores_the_interrupt_is_killed_and_the_next_starts_afresh(sandbox):
    stubborn = "import signal\nx = 1\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
    async with sandbox.session() as session:
        late = await session.run(stubborn, timeout=0.3)
        assert (late.status, late.return_code) == ("timeout", -9) and late.seconds < 10
        assert "NameError" in (await session.run("x")).stderr and session.restarts == 1


async def test_memory_limit(sandbox):
    async with sandbox.session(memory_mb=200) as session:
        await session.run("x = 5")
        assert (await session.run("bytearray(1 << 30)")).status == "memory"
        assert await texts(session, "print(x)") == ["5\n"]


@pytest.mark.parametrize("end", ["import os; os._exit(4)", "import os; os.close(3)", "import os; os.write(3, b'zz')"])
async def test_a_program_that_breaks_its_session_harms_only_itself(sandbox, end):
    async with sandbox.session() as session:
        broken = await session.run(f"print('x', flush=True)\n{end}", timeout=2)
        assert broken.status in ("finished", "timeout") and broken.stdout == "x\n"
        assert "NameError" in (await session.run("y")).stderr
        assert (await sandbox.run("print(1)")).stdout == "1\n"


async def test_output_is_bounded_per_cell(sandbox):
    async with sandbox.session() as session:
        assert (await session.run("print('1' * 100_000)")).truncated
        assert len((await session.run("print('1' * 100_000)", max_output=200_000)).stdout) == 100_001
        flood = await session.run("import os\nwhile True: os.write(1, bytes(65536))", timeout=20)
        assert "more than 16 MiB" in flood.stderr
        assert (await session.run("1", timeout=float("nan"))).status == "refused"
        assert (await session.run("1", max_output=1)).status == "refused"


async def test_idle_sessions_take_no_turn_and_all_end_with_the_executor(sandbox):
    async with executor.Embedded(sandbox.plan, max_active=2) as own:
        sessions = [own.session() for _ in range(6)]
        await asyncio.gather(*(session.run(f"x = {i}") for i, session in enumerate(sessions)))
        results = await asyncio.gather(*(session.run("print(x)") for session in sessions))
        assert [result.stdout for result in results] == [f"{i}\n" for i in range(6)]
        assert (await own.run("print(1)")).stdout == "1\n"
        await sessions[0].close()
        await sessions[0].close()


async def test_a_cancelled_cell_ends_its_process(sandbox):
    async with sandbox.session() as session:
        await session.run("x = 1")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(session.run("while True: pass", timeout=100), 0.3)
        assert "NameError" in (await asyncio.wait_for(session.run("x"), 20)).stderr
