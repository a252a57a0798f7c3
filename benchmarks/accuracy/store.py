"""Answers on disk, one JSON line each, so that an interrupted run can be resumed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO


@dataclass(frozen=True)
class Reply:
    """Answer of a server.

    Attributes:
        likely: the most likely first tokens with their log-probabilities.
    """

    text: str
    prompt_tokens: int
    likely: Mapping[str, float]


class Store:
    """The answers of one run.

    Args:
        path: a JSONL file; its first line describes the run.
        run: settings on which answers depend (model, workload, seed); a file of another run is refused.

    Raises:
        ValueError: the file holds the answers of another run.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path = path
        self.replies: dict[tuple[str, str], Reply] = {}
        whole = self._read(run) if path.exists() else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        # A run that was killed may have left half a line.
        path.write_text(whole or json.dumps({"run": run}) + "\n", encoding="utf-8")
        self._file: TextIO = path.open("a", encoding="utf-8")

    def _read(self, run: Mapping[str, Any]) -> str:
        text = self.path.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()
        if not lines:
            return ""
        other = json.loads(lines[0]).get("run")
        if other != json.loads(json.dumps(run)):
            raise ValueError(
                f"{self.path} holds the answers of another run ({other}, not {dict(run)}); "
                "allowed: the same run, or a file that does not exist"
            )
        for line in lines[1:]:
            row = json.loads(line)
            self.replies[row["variant"], row["item"]] = Reply(row["text"], row["tokens"], row["likely"])
        return "\n".join(lines) + "\n"

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.replies

    def __getitem__(self, key: tuple[str, str]) -> Reply:
        return self.replies[key]

    def add(self, variant: str, item: str, reply: Reply) -> None:
        """Keep an answer."""
        self.replies[variant, item] = reply
        row = {"variant": variant, "item": item, "text": reply.text, "tokens": reply.prompt_tokens}
        self._file.write(json.dumps({**row, "likely": dict(reply.likely)}) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
