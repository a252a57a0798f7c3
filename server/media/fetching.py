"""HTTP client for media: public addresses only, and no redirects unless the operator allows them."""

import asyncio
import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from vllm.connections import HTTPConnection
from vllm.exceptions import VLLMValidationError

Address = IPv4Address | IPv6Address
# Network with IPv4 addresses in its last 32 bits (RFC 6052).
_NAT64 = IPv6Network("64:ff9b::/96")


def is_public(address: Address) -> bool:
    """Whether an address is public: not private, loopback, link-local, multicast or reserved.

    Args:
        address: an IPv6 address that contains an IPv4 address is public if that is.
    """
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast


class GuardedConnection(HTTPConnection):
    """vLLM's media client with a check of the address of every connection as it is opened.

    Neither a name that resolves to an address of the server's own network (even if it changes between check and use)
    nor a redirect leads there. If the environment names a proxy for a URL, the proxy resolves and checks the name.
    """

    def __init__(self, allow_private: bool, allowed: Iterable[Address] = ()) -> None:
        """Open no connection yet.

        Args:
            allow_private: whether every address is allowed.
            allowed: addresses that the operator names, public or not.
        """
        super().__init__()
        self.allow_private = allow_private
        self.allowed = frozenset(allowed)
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def get_async_response(
        self,
        url: str,
        *,
        timeout: float | None = None,
        extra_headers: Mapping[str, str] | None = None,
        allow_redirects: bool = True,
    ) -> Any:
        """Begin a request; see vLLM's class."""
        self._validate_http_url(url)
        proxy = _proxy_of(url)
        return self._session(direct=proxy is None).get(
            url,
            headers=self._headers(**(extra_headers or {})),
            timeout=aiohttp.ClientTimeout(total=timeout),
            allow_redirects=allow_redirects,
            proxy=proxy,
        )

    def get_bytes(self, url: str, **kwargs: Any) -> bytes:
        """Synchronous `async_get_bytes`, for callers outside of an event loop.

        Args:
            url: URL of the medium.
            kwargs: arguments of vLLM's method.
        """
        own = GuardedConnection(self.allow_private, self.allowed)

        async def fetch() -> bytes:
            try:
                return bytes(await own.async_get_bytes(url, **kwargs))
            finally:
                await own.close()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, fetch()).result()

    async def close(self) -> None:
        """Close idle connections."""
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()

    def _session(self, direct: bool) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._sessions, self._loop = {}, loop
        if direct not in self._sessions:
            self._sessions[direct] = aiohttp.ClientSession(
                # No parallel attempts: the first address that is not allowed ends the request.
                connector=aiohttp.TCPConnector(
                    socket_factory=self._open if direct else None, happy_eyeballs_delay=None
                ),
                raise_for_status=_refuse_redirect,
            )
        return self._sessions[direct]

    def _open(self, info: tuple[Any, ...]) -> socket.socket:
        """Open a socket for a result of `getaddrinfo`.

        Raises:
            VLLMValidationError: the address is not allowed.
        """
        family, kind, protocol, _, where = info
        address = ip_address(where[0].partition("%")[0])
        if not (self.allow_private or is_public(address) or address in self.allowed):
            raise VLLMValidationError(
                "image_url: the host's address is not on the public internet; allowed: public addresses, or any "
                "where the server was started with --ficoco-allow-private-media",
                parameter="image_url",
            )
        return socket.socket(family=family, type=kind, proto=protocol)


@cache
def connection_to(domains: tuple[str, ...], allow_private: bool) -> GuardedConnection:
    """Client of this process for the operator's list.

    Args:
        domains: domains that media may come from; an address among them is allowed, public or not.
        allow_private: whether every address is allowed.
    """
    return GuardedConnection(allow_private, _addresses(domains))


def _addresses(domains: Iterable[str]) -> list[Address]:
    addresses = []
    for domain in domains:
        with suppress(ValueError):  # a name
            addresses.append(ip_address(domain.strip("[]")))
    return addresses


def _proxy_of(url: str) -> str | None:
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    return None if proxy is None or proxy_bypass(parts.netloc) else proxy


async def _refuse_redirect(response: aiohttp.ClientResponse) -> None:
    """Refuse a redirect that was not followed; its body is not a medium."""
    if HTTPStatus.MULTIPLE_CHOICES <= response.status < HTTPStatus.BAD_REQUEST:
        raise VLLMValidationError(
            f"image_url: the address answers with a redirect (HTTP {response.status}), and redirects are not "
            "followed; allowed: the address that it leads to, or any where the server was started with "
            "VLLM_MEDIA_URL_ALLOW_REDIRECTS=1",
            parameter="image_url",
        )
    response.raise_for_status()
