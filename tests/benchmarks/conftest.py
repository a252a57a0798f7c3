"""A server that does not apply what is requested."""

from typing import Any

import pytest

from ficoco_vllm.benchmarks.accuracy.variants import Variant


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A server that does not apply the request: fields that replace those of a method."""
    fields: list[dict[str, Any]] = []
    original = Variant.fields

    def changed(self: Variant) -> dict[str, Any]:
        requested = original(self)
        return requested if self.method is None else {"ficoco": {**requested["ficoco"], **fields[0]}}

    monkeypatch.setattr(Variant, "fields", changed)
    return fields
