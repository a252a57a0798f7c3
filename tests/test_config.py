"""Settings: what is accepted, and that every refusal names field, value and what is allowed."""

from types import SimpleNamespace
from typing import Any

import pytest

from ficoco_vllm.config import DEFAULT_METHOD, SETTINGS_METHOD, FicocoConfig


@pytest.mark.parametrize(
    ("values", "method", "keep", "settings"),
    [
        ({}, None, None, {}),
        ({"keep": 64}, DEFAULT_METHOD, 64, {}),
        ({"method": "tome"}, "tome", None, {}),
        ({"backend": "torch"}, None, None, {}),
        ({"keep": 9, "lam": 0.5}, SETTINGS_METHOD, 9, {"lam": 0.5}),
        (
            {"method": "ficoco-v", "settings": {"lam": 0.5}, "epsilon": 0.9},
            "ficoco-v",
            None,
            {"lam": 0.5, "epsilon": 0.9},
        ),
        ({"filter": "cls_attention"}, SETTINGS_METHOD, None, {"filter": "cls_attention"}),
        ({"method": "tome", "explain": True}, "tome", None, {}),
        ({"explain": False}, None, None, {}),
        ({"windows": "off"}, None, None, {}),
        ({"method": "ficoco-vl", "graph_budgets": [64]}, "ficoco-vl", None, {}),
    ],
)
def test_accepted(
    values: dict[str, Any], method: str | None, keep: int | None, settings: dict[str, Any]
) -> None:
    config = FicocoConfig.parse(values)
    assert (config.method, config.keep, config.settings) == (method, keep, settings)
    assert FicocoConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"method": "magic"}, ["method = 'magic'", "allowed: ", "ficoco-v"]),
        ({"keep": 0}, ["ficoco.keep = 0", "greater than or equal to 1"]),
        ({"keep": -5}, ["ficoco.keep = -5"]),
        ({"keep": 6.5}, ["ficoco.keep = 6.5", "integer"]),
        ({"keep": "64"}, ["ficoco.keep = '64'", "integer"]),
        ({"keep": True}, ["ficoco.keep = True", "integer"]),
        ({"lam": 2}, ["lam = 2", ">= 0", "<= 1"]),
        ({"lambda": 0.5}, ["lambda is not a setting of ficoco-v", "lam"]),
        ({"filter": "magic"}, ["filter = 'magic'", "cls_attention"]),
        ({"schedule": "sometimes"}, ["schedule = 'sometimes'", "even"]),
        ([64], ["[64]", "mapping"]),
        ({"explain": True}, ["explain = True", "without a method"]),
        ({"keep": 9, "explain": 1}, ["ficoco.explain = 1"]),
        ({"windows": "prompt"}, ["windows = 'prompt'", "without a method"]),
        ({"keep_per": "image"}, ["keep_per = 'image'", "without a method"]),
        ({"graph_budgets": [64]}, ["graph_budgets = (64,)", "without a method"]),
        ({"text_encoder": "clip"}, ["text_encoder = 'clip'", "without a method"]),
        ({"method": "ficoco-l", "text_encoder": "clip"}, ["text_encoder = 'clip'", "ficoco-l", "tower"]),
        ({"method": "ficoco-l", "graph_budgets": [64]}, ["graph_budgets = (64,)", "ficoco-l", "tower"]),
        ({"method": "downscale", "graph_budgets": [64]}, ["graph_budgets = (64,)", "downscale", "tower"]),
    ],
)
def test_refused(values: Any, parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is what is tested)
        FicocoConfig.parse(values)
    for part in parts:
        assert part in str(caught.value)


def test_of_a_model_without_settings() -> None:
    assert FicocoConfig.of(SimpleNamespace()).method is None
