"""API keys and rate limit of explanations."""

import time
from collections.abc import Sequence

from fastapi import HTTPException, Request
from starlette.datastructures import Headers


def api_keys(args: object, environment_key: str | None) -> list[str]:
    """API keys of the server. vLLM's own middleware checks them on vLLM's routes only.

    Args:
        args: options of the server.
        environment_key: value of VLLM_API_KEY.
    """
    given = getattr(args, "api_key", None) or [environment_key]
    return [key for key in given if key]


def check_key(headers: Headers, keys: Sequence[str]) -> None:
    """Check the bearer token, as vLLM's middleware does.

    Args:
        headers: headers of the request.
        keys: allowed keys; without any, every client is allowed.

    Raises:
        HTTPException: the token is none of them (401).
    """
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    if keys and not AuthenticationMiddleware(None, list(keys)).verify_token(headers):
        raise HTTPException(401, "Unauthorized")


class RateLimiter:
    """Limit of explanations a minute for each client address, since one costs several chats.

    It is a token bucket: after a pause a client may send several requests in a row.
    """

    def __init__(self, per_minute: int, max_clients: int = 4096) -> None:
        """Start with full buckets.

        Args:
            per_minute: explanations; 0 for no limit.
            max_clients: number of addresses kept; the least recently seen one is dropped.
        """
        self.per_minute = per_minute
        self.max_clients = max_clients
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait_seconds(self, client: str, now: float) -> float:
        """Count one explanation.

        Args:
            client: address of the client.
            now: seconds of a monotonic clock.

        Returns:
            0, or the seconds until the client's next explanation.
        """
        if self.per_minute == 0:
            return 0.0
        left, then = self._buckets.pop(client, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60.0)
        wait = 0.0 if left >= 1.0 else (1.0 - left) * 60.0 / self.per_minute
        self._buckets[client] = (left - 1.0 if wait == 0.0 else left, now)
        while len(self._buckets) > self.max_clients:
            del self._buckets[next(iter(self._buckets))]
        return wait

    def check(self, request: Request) -> None:
        """Count one explanation for the client of a request.

        Raises:
            HTTPException: the limit is reached (429, with `Retry-After`).
        """
        client = request.client.host if request.client else ""
        wait = self.wait_seconds(client, time.monotonic())
        if wait > 0.0:
            raise HTTPException(
                429,
                f"at most {self.per_minute} explanations a minute are allowed; try again in {wait:.0f} s",
                headers={"Retry-After": str(int(wait) + 1)},
            )
