"""How weights reach servers, without a server. Real ones: test_sglang_refit.py."""

import asyncio
import base64
import contextlib
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from open_agentrl_jax.rollout.refit import DISTRIBUTED, FILES, TENSORS, Refit, choose
from open_agentrl_jax.rollout.sending import MemoryFolder, Sender, SenderFailed
from open_agentrl_jax.rollout.sglang import SGLangPool
from open_agentrl_jax.types import Sampling, UserError
from tests.rollout.fake_sglang import VOCAB, FakeSGLang, expect

REMOTE, LOCAL = "https://a.example/x", "http://127.0.0.1:30000"


@pytest.mark.parametrize(
    ("way", "reason", "settings"),
    [
        ("tensors", "rollout.refit", {"wanted": "tensors", "urls": [LOCAL]}),
        ("files", "weights_dir", {"weights_dir": "/shared"}),
        ("files", "on this machine", {"urls": [LOCAL, "http://[::1]:1"]}),
        ("files", "on this machine", {"urls": []}),
        ("files", "sglang-jax", {"kind": "sglang_jax"}),
        ("files", "SGLANG_ENV", {"sender": False}),
        ("files", "/dev/shm", {"room": False}),
        ("distributed", "a.example", {}),
    ],
)
def test_the_way_and_its_reason(way, reason, settings):
    usual = {"wanted": "auto", "urls": [LOCAL, REMOTE], "kind": "sglang", "weights_dir": "", "sender": True}
    chosen, why = choose(**(usual | settings))
    assert chosen == way
    assert reason in why


@pytest.mark.parametrize("settings", [{"urls": [LOCAL, REMOTE]}, {"urls": [], "kind": "sglang_jax"}])
def test_a_way_that_the_servers_do_not_have(settings):
    usual = {"kind": "sglang", "weights_dir": "", "sender": True}
    with pytest.raises(UserError, match=r"rollout\.refit=tensors: "):
        choose("tensors", **(usual | settings))


def test_a_memory_folder_ends_with_a_killed_process(tmp_path):
    with_guard = (
        "import sys, time; from open_agentrl_jax.rollout.sending import MemoryFolder\n"
        "print(MemoryFolder(sys.argv[1]).path, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", with_guard, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        folder = pathlib.Path(run.stdout.readline().strip())
        (folder / "file").write_text("")
        run.kill()
        run.communicate()
    for _ in range(500):
        if not folder.exists():
            break
        subprocess.run(["sleep", "0.01"])
    assert not folder.exists()
    own = MemoryFolder(str(tmp_path))
    own.close()
    assert not own.path.exists()


async def test_the_sender_shares_the_tensors_of_a_file(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.numpy import save_file

    for number, name in enumerate(("a", "b")):
        arrays = {f"{name}.{i}": np.full((3, 2 + i), 10 * number + i, np.float16) for i in range(2)}
        save_file(arrays, tmp_path / f"model-{number}.safetensors")
    sender = Sender(sys.executable, 60)
    try:
        buckets = (await sender.call("buckets", path=str(tmp_path)))["buckets"]
        assert [bucket["names"] for bucket in buckets] == [["a.0", "a.1"], ["b.0", "b.1"]]
        assert buckets[1]["shapes"] == [[3, 2], [3, 3]] and buckets[1]["dtypes"] == ["float16"] * 2
        payload = (await sender.call("share", path=str(tmp_path), bucket=1, reuse=True))["payload"]
        named = dict(pickle.loads(base64.b64decode(payload)))
        torch.testing.assert_close(named["b.1"], torch.full((3, 3), 11, dtype=torch.float16))
        with pytest.raises(SenderFailed, match="cannot send"):
            await sender.call("send", group="unknown", path=str(tmp_path), bucket=0)
        sender.kill()
        with pytest.raises(SenderFailed, match="died"):
            await sender.call("buckets", path=str(tmp_path))
        assert (await sender.call("buckets", path=str(tmp_path)))["buckets"] == buckets
        assert sender.lives == 2
    finally:
        await sender.close()


class FakeSender:
    """Two buckets whose tensors' name is the path; the transfer `broken` never finishes."""

    lives, broken, sent, reused = 1, -1, 0, ()

    async def call(self, op, seconds=None, **fields):
        if op == "share":
            self.reused = (*self.reused, fields["reuse"])
            return {"payload": fields["path"]}
        if op == "send":
            self.sent += 1
            if self.sent == self.broken:
                raise SenderFailed("the sender died")
        bucket = {"names": [fields.get("path")], "dtypes": [], "shapes": []}
        return {"buckets": [bucket, bucket], "port": 1, "backend": "gloo"}

    async def close(self):
        pass


@pytest.mark.parametrize("shared", [True, False])
async def test_no_token_comes_from_half_replaced_weights(shared):
    async with FakeSGLang() as server:
        sender = FakeSender()
        way = Refit(DISTRIBUTED, sender, shared=shared)  # the server is on this machine and can read files anyway
        async with SGLangPool([server.url], vocab_size=VOCAB, interval=0.05, refit=way) as pool:
            await pool.update_weights("1", 1)
            assert server.received == ["1", "1"]
            server.hold_at = 16
            running = asyncio.ensure_future(pool.generate([1, 2], Sampling(40), session="a"))
            while server.generated < 16:
                await asyncio.sleep(0.01)
            sender.broken = sender.sent + 2  # after the first of two buckets
            update = asyncio.ensure_future(pool.update_weights("2", 2))
            while sender.sent < sender.broken:
                await asyncio.sleep(0.01)
            server.hold_at = None
            await update
            expect(await running, [1, 2], [(1, 1, 16), (2, 2, 24)])
            assert way.fallbacks == 1 and way.way(pool.fleet.servers[0]) == DISTRIBUTED
            sender.broken = sender.sent + 1
            await pool.update_weights("3", 3)
            assert way.way(pool.fleet.servers[0]) == FILES  # two in a row
            expect(await pool.generate([1, 2], Sampling(9)), [1, 2], [(3, 3, 9)])


async def test_a_server_that_sees_no_files_is_tried_again(monkeypatch):
    monkeypatch.setattr("open_agentrl_jax.rollout.refit.on_this_machine", lambda url: False)
    async with FakeSGLang() as server:
        sender = FakeSender()
        way = Refit(DISTRIBUTED, sender, shared=False)
        async with SGLangPool([server.url], vocab_size=VOCAB, interval=0.05, refit=way) as pool:
            sender.broken = 2
            await pool.update_weights("5", 5)
            assert sender.sent == 4 and way.fallbacks == 0
            expect(await pool.generate([1, 2], Sampling(9)), [1, 2], [(5, 5, 9)])


async def test_a_slow_server_does_not_hold_the_others():
    async with contextlib.AsyncExitStack() as stack:
        fast, slow = [await stack.enter_async_context(FakeSGLang()) for _ in range(2)]
        pool = await stack.enter_async_context(SGLangPool([fast.url, slow.url], vocab_size=VOCAB, interval=0.05))
        await pool.update_weights("1", 1)
        while len(pool.fleet.ready()) < 2:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(pool.generate([1], Sampling(4), session=session) for session in "ab"))
        home = {session: server.url for session, server in pool._homes.items()}
        assert set(home.values()) == {fast.url, slow.url}
        slow.loading.clear()
        update = asyncio.ensure_future(pool.update_weights("2", 2))
        later = {s: asyncio.ensure_future(pool.generate([1], Sampling(4), session=s)) for s in "abc"}
        (waits,) = (session for session, url in home.items() if url == slow.url)
        for session in set("abc") - {waits}:
            expect(await later[session], [1], [(2, 2, 4)])
        assert not update.done() and not later[waits].done()
        slow.loading.set()
        await update
        expect(await later[waits], [1], [(2, 2, 4)])
        assert pool._homes[waits].url == slow.url


async def test_memory_that_a_slow_server_reads_is_not_overwritten():
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(FakeSGLang()) for _ in range(2)]
        sender = FakeSender()
        settings = {"interval": 0.05, "straggler_seconds": 0.1, "refit": Refit(TENSORS, sender)}
        urls = [server.url for server in servers]
        pool = await stack.enter_async_context(SGLangPool(urls, vocab_size=VOCAB, **settings))
        await pool.update_weights("1", 1)
        while len(pool.fleet.ready()) < 2:
            await asyncio.sleep(0.01)
        servers[1].loading.clear()
        before = len(sender.reused)
        await pool.update_weights("2", 2)  # only the first server
        await pool.update_weights("3", 3)
        assert sender.reused[before:] == (True,) * 4 + (False,) * 2
        servers[1].loading.set()
        while len(pool.fleet.ready()) < 2:
            await asyncio.sleep(0.01)
        assert {server.version for server in servers} == {"3"}
