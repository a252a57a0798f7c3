"""Answers on disk, one JSON line each, so that an interrupted run can be resumed."""

import json
from collections import UserDict
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


class Store(UserDict[tuple[str, str], Reply]):
    """The answers of one run, by variant and question.

    Args:
        path: a JSONL file; its first line describes the run.
        run: settings on which answers depend (model, workload, seed); a file of another run is refused.

    Raises:
        ValueError: the file holds the answers of another run.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        super().__init__()
        whole = self._read(path, run) if path.exists() else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        # A run that was killed may have left half a line.
        path.write_text(whole or json.dumps({"run": run}) + "\n", encoding="utf-8")
        self._file: TextIO = path.open("a", encoding="utf-8")

    def _read(self, path: Path, run: Mapping[str, Any]) -> str:
        text = path.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()
        if not lines:
            return ""
        other = json.loads(lines[0]).get("run")
        if other != json.loads(json.dumps(run)):
            raise ValueError(
                f"{path} holds the answers of another run ({other}, not {dict(run)}); "
                "allowed: the same run, or a file that does not exist"
            )
        for line in lines[1:]:
            row = json.loads(line)
            self[row["variant"], row["item"]] = Reply(row["text"], row["tokens"], row["likely"])
        return "\n".join(lines) + "\n"

    def add(self, variant: str, item: str, reply: Reply) -> None:
        """Keep an answer."""
        self[variant, item] = reply
        row = {"variant": variant, "item": item, "text": reply.text, "tokens": reply.prompt_tokens}
        self._file.write(json.dumps({**row, "likely": dict(reply.likely)}) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
