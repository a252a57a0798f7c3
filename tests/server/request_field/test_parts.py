"""From what a request asks to what processor and decoder are told, without a server."""

from typing import Any

import pytest

from ficoco_vllm import demo_model
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.server.request_field.resolve import UNBOUNDED, Bounds, Resolver
from ficoco_vllm.server.request_field.schema import parse


def resolver(settings: dict[str, Any], bounds: Bounds = UNBOUNDED) -> Resolver:
    """Of a server of the demo model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo_model.path())
    return Resolver(ServerPlan.of(FicocoConfig.parse(settings), config), bounds)


def tell(resolver: Resolver, ficoco: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What processor and decoder are told."""
    asked = parse(ficoco)
    assert asked is not None
    told = resolver.tell(asked)
    return dict(told.tower), dict(told.decoder)


def test_tower() -> None:
    tower = resolver({"method": "ficoco-v", "keep": 64})
    assert tell(tower, {"method": "tome", "keep": 96}) == ({"ficoco_method": "tome", "ficoco_keep": 96}, {})
    assert tell(tower, {"kv_budget": 96.5}) == ({"ficoco_keep": 96}, {})
    assert tell(tower, {}) == ({}, {})
    assert tell(tower, "off") == ({"ficoco_keep": 576}, {})


def test_decoder() -> None:
    decoder = resolver({"method": "ficoco-l", "keep": 64})
    assert tell(decoder, {"method": "fastv", "keep": 9}) == ({}, {"ficoco_method": "fastv", "ficoco_keep": 9})
    assert tell(decoder, "off") == ({}, {"ficoco_keep": 576})


def test_kv_budget_is_met_from_below() -> None:
    decoder = resolver({"method": "ficoco-l", "keep": 64})
    planner = decoder.plan.decoder
    assert planner is not None

    def mean(keep: int) -> float:
        counts = planner.counts("ficoco-l", 576, keep)
        return sum(counts) / len(counts)

    _, told = tell(decoder, {"kv_budget": 400})
    assert mean(told["ficoco_keep"]) <= 400 < mean(told["ficoco_keep"] + 1)
    with pytest.raises(ValueError, match=f"allowed: {mean(1):.2f} to 576.00"):
        tell(decoder, {"kv_budget": mean(1) - 1})


def test_both() -> None:
    both = resolver({"method": "ficoco-vl", "keep": 64})
    assert tell(both, {"keep": 64}) == ({"ficoco_keep": 192}, {"ficoco_keep": 64})
    assert tell(both, "off") == ({"ficoco_keep": 576}, {"ficoco_keep": 576})
    assert both.methods == ("ficoco-vl",)
    fixed = resolver({"method": "ficoco-vl", "keep": 64, "encoder": {"keep": 100}})
    assert tell(fixed, {"keep": 200}) == ({}, {"ficoco_keep": 100})


def test_bounds() -> None:
    bounded = resolver({"method": "ficoco-v", "keep": 64}, Bounds(32, ("tome", "ficoco-v")))
    assert tell(bounded, {"keep": 32})
    for ficoco, words in (
        ({"keep": 31}, "an integer from 32 to 576"),
        ({"kv_budget": 31}, "32.00 to 576.00"),
        ({"method": "evit"}, "allowed: ficoco-v, tome$"),
        ("off", "allowed: tome, ficoco-v"),
    ):
        with pytest.raises(ValueError, match=words):
            tell(bounded, ficoco)
    bounded.check_raw("vllm_xargs", {"ficoco_keep": 32, "ficoco_method": "tome", "other": 1})
    with pytest.raises(ValueError, match=r"vllm_xargs.ficoco_keep = 3 is not allowed"):
        bounded.check_raw("vllm_xargs", {"ficoco_keep": 3}, entering=48)
    bounded.check_raw("vllm_xargs", {"ficoco_keep": 9}, entering=9)  # all that there is
    with pytest.raises(ValueError, match=r"ficoco.keep = 576 is not allowed; allowed: fewer than all"):
        tell(bounded, {"keep": 576})
    assert tell(resolver({"method": "ficoco-v"}, Bounds(1, ("off",))), {"keep": 576})
    with pytest.raises(ValueError, match=r"mm_processor_kwargs.ficoco_method = 'evit'"):
        bounded.check_raw("mm_processor_kwargs", {"ficoco_method": "evit"})
