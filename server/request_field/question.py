"""Questions about images, extracted from the messages of a chat."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any


def question_of(messages: Sequence[Any]) -> str | None:
    """The text that comes with the last image.

    The text of its message; without one, the text of the user's next message that has any, or of the one before. Later
    turns without an image change nothing, so that the caches still have the image.

    Args:
        messages: messages of a chat, each a mapping with `content`: a text, or parts with `type`.

    Returns:
        None without an image, or where no message of a user has a text.
    """
    last = max((number for number, message in enumerate(messages) if _has_image(message)), default=None)
    if last is None:
        return None
    texts = (_text(message) for message in (*messages[last:], *reversed(messages[:last])))
    return next(filter(None, texts), None)


def first_turn(messages: Sequence[Any]) -> bytes | None:
    """Digest of a chat up to the end of its first turn with an image, which later turns repeat.

    Args:
        messages: messages of a chat; see `question_of`.

    Returns:
        None without an image.
    """
    first = next((number for number, message in enumerate(messages) if _has_image(message)), None)
    if first is None:
        return None
    replies = (
        number
        for number, message in enumerate(messages)
        if number > first and isinstance(message, dict) and message.get("role") == "assistant"
    )
    turn = messages[: next(replies, len(messages))]
    return hashlib.sha256(json.dumps(turn, sort_keys=True, default=str).encode()).digest()


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content) if isinstance(content, list | tuple) else []


def _has_image(message: Any) -> bool:
    # A part may have no type, but then names its image.
    return any(
        "image" in name
        for part in _parts(message)
        if isinstance(part, dict)
        for name in (str(part.get("type")), *part)
    )


def _text(message: Any) -> str:
    """The text of a message, empty unless it is a user's."""
    if isinstance(message, dict) and message.get("role", "user") != "user":
        return ""
    texts = (part if isinstance(part, str) else part.get("text") for part in _parts(message))
    return "\n".join(text for text in texts if isinstance(text, str)).strip()
