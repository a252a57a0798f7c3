"""The question of a chat about its images, for methods that compare the two."""

from collections.abc import Sequence
from typing import Any


def question_of(messages: Sequence[Any]) -> str | None:
    """The text that comes with the last image.

    That of its message; if there is none, that of the user's next message which has some, or of the one before. Later
    turns without an image change nothing, so that the caches still have the image.

    Args:
        messages: of a chat, each a mapping with `content`: a text, or parts with `type`.

    Returns:
        None without an image, or where no message of a user has a text.
    """
    last = max((number for number, message in enumerate(messages) if _has_image(message)), default=None)
    if last is None:
        return None
    texts = (_text(message) for message in (*messages[last:], *reversed(messages[:last])))
    return next(filter(None, texts), None)


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content) if isinstance(content, list | tuple) else []


def _has_image(message: Any) -> bool:
    # A part may do without a type, and names its image then.
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
