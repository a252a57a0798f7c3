"""API keys and rate limit of explanations."""

import time
from collections import deque
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
    """Limit of explanations for each client address in any 60 seconds, since one costs several chats."""

    def __init__(self, per_minute: int, max_clients: int = 4096) -> None:
        """Start with no explanation counted.

        Args:
            per_minute: explanations; 0 for no limit.
            max_clients: number of addresses kept; the least recently seen one is dropped.
        """
        self.per_minute = per_minute
        self.max_clients = max_clients
        # When each client's latest explanations were counted.
        self._counted: dict[str, deque[float]] = {}

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
        counted = self._counted[client] = self._counted.pop(client, deque(maxlen=self.per_minute))
        while len(self._counted) > self.max_clients:
            del self._counted[next(iter(self._counted))]
        if len(counted) == self.per_minute and counted[0] > now - 60.0:
            return counted[0] + 60.0 - now
        counted.append(now)
        return 0.0

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
