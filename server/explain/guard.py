"""Who may ask for an explanation, and how often."""

import time
from collections.abc import Sequence

from fastapi import HTTPException, Request
from starlette.datastructures import Headers


def api_keys(args: object, environment_key: str | None) -> list[str]:
    """The keys that vLLM's own middleware asks for; it looks at vLLM's own routes only.

    Args:
        args: of the server's command line.
        environment_key: VLLM_API_KEY.
    """
    given = getattr(args, "api_key", None) or [environment_key]
    return [key for key in given if key]


def check_key(headers: Headers, keys: Sequence[str]) -> None:
    """Compare the bearer token, as vLLM's middleware does.

    Args:
        headers: of the request.
        keys: that are allowed; none means that everybody may ask.

    Raises:
        HTTPException: 401.
    """
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    if keys and not AuthenticationMiddleware(None, list(keys)).verify_token(headers):
        raise HTTPException(401, "Unauthorized")


class RateLimiter:
    """So many explanations a minute, of each client's address; each costs several chats.

    A bucket that fills with time: a client that has been quiet may ask several times at once.
    """

    def __init__(self, per_minute: int, max_clients: int = 4096) -> None:
        """Start with full buckets.

        Args:
            per_minute: explanations; 0 means that there is no limit.
            max_clients: addresses that are remembered; the one that has been quiet for longest is forgotten.
        """
        self.per_minute = per_minute
        self.max_clients = max_clients
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait_seconds(self, client: str, now: float) -> float:
        """Take one explanation.

        Args:
            client: its address.
            now: seconds of a clock that does not go back.

        Returns:
            0, or how long the client must wait for the next one.
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
        """Take one explanation for the client of a request.

        Raises:
            HTTPException: 429, with `Retry-After`.
        """
        client = request.client.host if request.client else ""
        wait = self.wait_seconds(client, time.monotonic())
        if wait > 0.0:
            raise HTTPException(
                429,
                f"at most {self.per_minute} explanations a minute are allowed; try again in {wait:.0f} s",
                headers={"Retry-After": str(int(wait) + 1)},
            )
