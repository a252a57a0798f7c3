"""Answers on disk, one JSON line each, so that an interrupted run can be resumed."""

import json
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Reply:
    """Answer of a server, with the log-probabilities of the most likely first tokens."""

    text: str
    prompt_tokens: int
    likely: Mapping[str, float]


class Store(UserDict[tuple[str, str], Reply]):
    """The answers of one run, by variant and question, in a JSONL file whose first line describes the run.

    The settings in `run` are those on which answers depend (model, workload, seed).

    Raises:
        ValueError: the file holds the answers of another run.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        super().__init__()
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a run that was killed may have left half a line
        head, *lines = whole.splitlines() or [json.dumps({"run": run})]
        other = json.loads(head).get("run")
        if other != json.loads(json.dumps(run)):
            raise ValueError(
                f"{path} holds the answers of another run ({other}, not {dict(run)}); "
                "allowed: the same run, or a file that does not exist"
            )
        for row in map(json.loads, lines):
            self[row["variant"], row["item"]] = Reply(row["text"], row["tokens"], row["likely"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([head, *lines, ""]), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

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
