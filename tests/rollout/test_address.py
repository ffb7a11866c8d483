"""Addresses of servers: URLs, proxies and API keys."""

import pytest

from open_agentrl_jax.rollout import address
from open_agentrl_jax.types import UserError

PROXY = "http://proxy:3128"


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://host:30000", "http://host:30000"),
        (" https://host/team/a/ ", "https://host/team/a"),
        ("http://[::1]:30000/", "http://[::1]:30000"),
        ("http://10.0.0.7", "http://10.0.0.7"),
    ],
)
def test_base_urls(url, base):
    assert address.base_url(url) == base


@pytest.mark.parametrize(
    "url",
    ["host:30000", "127.0.0.1:30000", "", "ftp://host", "http://", "http://::1:30000", "http://host:x", "http://h?a"],
)
def test_what_is_no_base_url_is_rejected(url):
    with pytest.raises(UserError, match=r"^rollout\.servers: "):
        address.base_url(url)


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://127.0.0.1:1", None),
        ("http://[::1]:1", None),
        ("http://localhost:1", None),
        ("http://inside.example", None),
        ("http://outside.example", PROXY),
        ("https://outside.example", None),
    ],
)
def test_loopback_and_no_proxy_hosts_are_reached_directly(monkeypatch, url, proxy):
    monkeypatch.setenv("http_proxy", PROXY)
    monkeypatch.setenv("no_proxy", "inside.example")
    for name in ("https_proxy", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert address.proxy_for(url) == proxy


def test_the_api_key_comes_from_the_environment(monkeypatch):
    assert address.api_key("") == ""
    monkeypatch.setenv("KEY", " secret ")
    assert address.api_key("KEY") == "secret"
    monkeypatch.delenv("KEY")
    with pytest.raises(UserError, match=r"rollout\.api_key_env: .* KEY is not set"):
        address.api_key("KEY")
