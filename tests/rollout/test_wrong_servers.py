"""Wrong addresses and servers that send nonsense: one line within seconds, and the other servers carry on."""

import asyncio
import contextlib
import json
import pathlib
import shutil
import ssl
import subprocess
import time

import numpy as np
import pytest
from aiohttp import web

from open_agentrl_jax.config import Config, Rollout
from open_agentrl_jax.rollout import fleet
from open_agentrl_jax.rollout.engine import EngineError
from open_agentrl_jax.rollout.sglang import SGLangPool
from open_agentrl_jax.run.engines import check_generation
from open_agentrl_jax.types import Sampling, UserError
from tests.rollout.fake_sglang import VOCAB, FakeSGLang, expect


@contextlib.asynccontextmanager
async def answering(status=200, body="", content_type="text/html", host="127.0.0.1", tls=None):
    """A web server that gives every request the same answer; yields its URL."""

    async def handle(request):
        return web.Response(status=status, text=body, content_type=content_type)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, host, 0, ssl_context=tls).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def make_pool(*urls, **settings):
    settings = {"interval": 0.05, "outage": 5.0, "startup_seconds": 0.3, **settings}
    return SGLangPool(urls, vocab_size=VOCAB, **settings)


ADDRESSES = [
    (401, "", r"HTTP 401: .*rollout\.api_key_env"),
    (404, "", r"HTTP 404: no SGLang server at this address"),
    (200, "<html>", r"not a JSON object"),
    (200, "[1]", r"not a JSON object"),
    (500, "", r"HTTP 500"),
]


@pytest.mark.parametrize(("status", "body", "reason"), ADDRESSES)
async def test_an_address_without_a_server_fails_within_the_startup_time(status, body, reason):
    async with answering(status, body) as url:
        pool, began = make_pool(url, outage=600.0), time.monotonic()
        with pytest.raises(EngineError, match=reason) as caught:
            await pool.open()
        await pool.close()
    assert time.monotonic() - began < 3
    assert "\n" not in str(caught.value)


async def test_nobody_there_is_reported_with_progress(caplog, monkeypatch):
    monkeypatch.setattr(fleet, "PROGRESS_SECONDS", 0.1)
    pool = make_pool("http://127.0.0.1:1", outage=600.0)
    with pytest.raises(EngineError, match=r"no usable SGLang server for 0 s: http://127\.0\.0\.1:1: down"):
        await pool.open()
    await pool.close()
    assert any("waiting for SGLang servers" in r.message and "127.0.0.1:1" in r.message for r in caplog.records)


async def test_a_server_that_starts_late_is_waited_for():
    async with FakeSGLang() as server:
        server.down = True
        async with asyncio.timeout(5):
            pool = make_pool(server.url, startup_seconds=30.0)
            opening = asyncio.ensure_future(pool.open())
            await asyncio.sleep(0.2)
            assert not opening.done()
            server.down = False
            await opening
        await pool.close()


# What a server may send, and what must come of it: its own answer is an error, the next attempt's is complete.
NONSENSE = [
    {"output_token_logprobs": [[None, 1, None]] * 8},
    {"output_token_logprobs": [[float("nan"), 1, None]] * 8},
    {"output_token_logprobs": [[float("-inf"), 1, None]] * 8},
    {"output_token_logprobs": [["-1", 1, None]] * 8},
    {"output_token_logprobs": None},
    {"finish_reason": 7},
    {"finish_reason": ["stop"]},
    {"weight_versions": {"version": 1}},
    {"weight_versions": ["x"]},
    {"output_ids": ["1"] * 8},
    {"output_ids": 3},
    {"error": {"code": "overloaded", "message": "no"}},
    {"error": None},
    [],
    3,
    None,
]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=json.dumps)
async def test_a_malformed_answer_counts_as_a_fault_of_the_server(nonsense):
    async with FakeSGLang() as server, make_pool(server.url) as pool:
        server.nonsense = [nonsense]
        one = await asyncio.wait_for(pool.generate([1, 2], Sampling(16)), 5)
        expect(one, [1, 2], [(0, 0, 16)])
        assert pool.metrics()["rollout/retries"] == 1


async def test_harmless_variants_are_accepted():
    async with FakeSGLang() as server, make_pool(server.url) as pool:
        server.nonsense = [{"finish_reason": "length", "prompt_tokens": "many", "cached_tokens": None}]
        one = await asyncio.wait_for(pool.generate([1, 2], Sampling(8)), 5)
        assert (one.finish_reason, len(one.ids)) == ("length", 8)


@pytest.mark.parametrize("info", [{"context_length": "auto"}, {"context_length": None, "max_total_tokens": "x"}, {}])
async def test_unknown_limits_are_no_limits(info):
    async with FakeSGLang() as server:
        server.info = info
        async with make_pool(server.url) as pool:
            assert len((await pool.generate([1, 2], Sampling(8))).ids) == 8


@pytest.mark.parametrize("body", ["[]", "3", "null", '{"weight_version": ', "<html>"])
async def test_the_watcher_outlives_any_answer(body):
    async with FakeSGLang() as server, make_pool(server.url) as pool:
        server.raw["model_info"] = body
        async with asyncio.timeout(5):
            while pool.fleet.ready():
                await asyncio.sleep(0.02)
            del server.raw["model_info"]
            while not pool.fleet.ready():
                await asyncio.sleep(0.02)
        assert len((await pool.generate([1], Sampling(4))).ids) == 4


async def test_weights_with_non_finite_log_probs_are_quarantined():
    async with FakeSGLang() as server:
        server.raw["generate"] = json.dumps({"meta_info": {"input_token_logprobs": [[None, 1, None]] * 40}})
        pool = make_pool(server.url, replay=lambda ids: np.zeros(len(ids), np.float32), outage=1.0)
        with pytest.raises(EngineError, match=r"quarantined .*not finite numbers"):
            await pool.update_weights("3", 1)
        await pool.close()


async def test_an_update_that_reports_failure_is_not_a_success():
    async with FakeSGLang() as server:
        server.raw["update_weights_from_disk"] = json.dumps({"success": False, "message": "no such folder"})
        pool = make_pool(server.url, outage=1.0)
        with pytest.raises(EngineError, match="no such folder"):
            await pool.update_weights("3", 1)
        await pool.close()


async def test_keys_prefixes_and_ipv6():
    async with FakeSGLang(host="::1", prefix="/team/a", key="secret") as server:
        assert server.url.startswith("http://[::1]:")
        async with make_pool(server.url, api_key="secret") as pool:
            await pool.update_weights("3", 1)
            expect(await pool.generate([1, 2], Sampling(8)), [1, 2], [(3, 1, 8)])
        pool = make_pool(server.url, api_key="wrong")
        with pytest.raises(EngineError, match=r"rollout\.api_key_env"):
            await pool.open()
        await pool.close()


@pytest.fixture
def certificate(tmp_path):
    """A self-signed certificate for 127.0.0.1 with its key, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    file = str(tmp_path / "tls.pem")
    subject = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    made = subprocess.run(["openssl", "req", "-x509", *key, "-keyout", "-", *subject], check=True, capture_output=True)
    pathlib.Path(file).write_bytes(made.stdout)
    return file


async def test_https_is_verified(certificate, monkeypatch):
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    async with FakeSGLang(tls=tls) as server:
        assert server.url.startswith("https://")
        pool = make_pool(server.url)
        with pytest.raises(EngineError, match="CERTIFICATE_VERIFY_FAILED"):
            await pool.open()
        await pool.close()
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        async with make_pool(server.url) as pool:
            assert len((await pool.generate([1, 2], Sampling(8))).ids) == 8


async def test_a_proxy_of_the_environment_is_not_used_for_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with FakeSGLang() as server, make_pool(server.url) as pool:
        assert len((await pool.generate([1, 2], Sampling(8))).ids) == 8


async def test_a_proxy_of_the_environment_is_used_for_other_hosts(monkeypatch):
    async with FakeSGLang() as server:
        monkeypatch.setenv("http_proxy", server.url)  # as a proxy it gets the whole URL and serves the request itself
        async with make_pool("http://server.invalid:30000") as pool:
            assert len((await pool.generate([1, 2], Sampling(8))).ids) == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"servers": ("host:30000",)}, r"rollout\.servers: 'host:30000'"),
        ({"servers": ("http://127.0.0.1:1",)}, r"rollout\.servers: no usable SGLang server .*127\.0\.0\.1:1"),
        ({"launch_servers": 1}, r"rollout\.launch_servers: no server at .*install\.sh"),
        ({"launch_servers": 1, "server_kind": "sglang_jax"}, r"rollout\.launch_servers: .*sglang_jax/install\.sh"),
        ({"servers": ("http://h",), "api_key_env": "NO_SUCH_KEY"}, r"rollout\.api_key_env"),
    ],
)
def test_a_run_checks_its_servers_before_it_trains(fields, message, monkeypatch, tmp_path):
    for variable in ("SGLANG_ENV", "SGLANG_JAX_ENV"):
        monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        check_generation(Config(rollout=Rollout(engine="sglang", startup_seconds=0.3, **fields)))
    assert "\n" not in str(caught.value)
    check_generation(Config(rollout=Rollout(engine="local")))
