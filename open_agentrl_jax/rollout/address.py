"""Server addresses: which URLs are accepted, which proxy leads there, and which API key is sent."""

from __future__ import annotations

import ipaddress
import os
import urllib.parse
import urllib.request

from open_agentrl_jax.types import UserError


def base_url(url: str) -> str:
    """Checks the address of a server and returns it without a trailing slash.

    Accepts http and https, names, IPv4 and bracketed IPv6 addresses, ports and path prefixes.

    Raises:
        UserError: the text is no such URL.
    """
    text = str(url).strip()
    try:
        parts = urllib.parse.urlsplit(text)
        _ = parts.port  # raises for a port that is no number, as in an IPv6 address without brackets
    except ValueError as error:
        raise UserError(f"rollout.servers: {text!r} is not a URL ({error}); use http://HOST:PORT") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"rollout.servers: {text!r} is not a URL of a server; use http://HOST:PORT")
    if parts.query or parts.fragment:
        raise UserError(f"rollout.servers: {text!r}: a base URL has no '?' and no '#'")
    return text.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for `url`; None for this machine and for hosts in NO_PROXY."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def api_key(variable: str) -> str:
    """The key in the environment variable `variable`; empty if no variable is named.

    Raises:
        UserError: the variable is not set, or empty.
    """
    if not variable:
        return ""
    if key := os.environ.get(variable, "").strip():
        return key
    raise UserError(f"rollout.api_key_env: the environment variable {variable} is not set")
