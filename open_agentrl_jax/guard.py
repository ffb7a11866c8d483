"""Who may use an HTTP server of ours: holders of its token, or without a token only programs on this machine.

A server without a token checks the Host and Origin headers. Host names another machine when a web page reaches the
server through DNS rebinding, and Origin does when a page sends the request itself.
"""

from __future__ import annotations

import hmac
import ipaddress
from typing import Protocol
from urllib.parse import urlsplit


def loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Headers(Protocol):
    """The headers of a request, looked up without regard to case."""

    def get(self, name: str, default: str, /) -> str:
        """The value of a header."""
        ...  # pragma: no cover


def foreign(headers: Headers, served: str = "") -> str:
    """The first of Host and Origin that names another machine, as "name value"; "" if none does.

    Args:
        headers: of a request; a missing Host is foreign, a missing Origin is not.
        served: the address that the server listens on, which is accepted beside the loopback names.
    """
    host, origin = headers.get("Host", ""), headers.get("Origin", "")
    if not _local(host, served):
        return f"Host {host!r}"
    if origin and not _local(origin.partition("://")[2], served):
        return f"Origin {origin!r}"
    return ""


def _local(netloc: str, served: str) -> bool:
    try:
        name = urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return False
    return loopback(name) or (bool(name) and name == served)


def matches(given: str, token: str) -> bool:
    """Whether a client's text is the token, with or without "Bearer "; the comparison takes constant time."""
    return hmac.compare_digest(given.removeprefix("Bearer ").encode("utf-8", "surrogateescape"), token.encode())
