"""From the field `ficoco` to the arguments of processor and decoder, without a server."""

from typing import Any

import pytest

from ficoco_vllm import demo_model
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.server.request_field.resolve import UNBOUNDED, Bounds, Resolver
from ficoco_vllm.server.request_field.schema import parse


def resolver(settings: dict[str, Any], bounds: Bounds = UNBOUNDED) -> Resolver:
    """Resolver of a server of the demo model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo_model.path())
    return Resolver(ServerPlan.of(FicocoConfig.parse(settings), config), bounds)


def resolve(resolver: Resolver, ficoco: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of processor and decoder."""
    requested = parse(ficoco)
    assert requested is not None
    resolved = resolver.resolve(requested)
    return dict(resolved.tower), dict(resolved.decoder)


def test_tower() -> None:
    tower = resolver({"method": "ficoco-v", "keep": 64})
    assert resolve(tower, {"method": "tome", "keep": 96}) == (
        {"ficoco_method": "tome", "ficoco_keep": 96},
        {},
    )
    assert resolve(tower, {"kv_budget": 96.5}) == ({"ficoco_keep": 96}, {})
    assert resolve(tower, {}) == ({}, {})
    assert resolve(tower, "off") == ({"ficoco_keep": 576}, {})


def test_decoder() -> None:
    decoder = resolver({"method": "ficoco-l", "keep": 64})
    assert resolve(decoder, {"method": "fastv", "keep": 9}) == (
        {},
        {"ficoco_method": "fastv", "ficoco_keep": 9},
    )
    assert resolve(decoder, "off") == ({}, {"ficoco_keep": 576})


def test_kv_budget_is_met_from_below() -> None:
    decoder = resolver({"method": "ficoco-l", "keep": 64})
    planner = decoder.plan.decoder
    assert planner is not None

    def mean(keep: int) -> float:
        counts = planner.counts("ficoco-l", 576, keep)
        return sum(counts) / len(counts)

    _, arguments = resolve(decoder, {"kv_budget": 400})
    assert mean(arguments["ficoco_keep"]) <= 400 < mean(arguments["ficoco_keep"] + 1)
    with pytest.raises(ValueError, match=f"allowed: {mean(1):.2f} to 576.00"):
        resolve(decoder, {"kv_budget": mean(1) - 1})


def test_both() -> None:
    both = resolver({"method": "ficoco-vl", "keep": 64})
    assert resolve(both, {"keep": 64}) == ({"ficoco_keep": 192}, {"ficoco_keep": 64})
    assert resolve(both, "off") == ({"ficoco_keep": 576}, {"ficoco_keep": 576})
    assert both.methods == ("ficoco-vl",)
    fixed = resolver({"method": "ficoco-vl", "keep": 64, "encoder": {"keep": 100}})
    assert resolve(fixed, {"keep": 200}) == ({}, {"ficoco_keep": 100})


def test_bounds() -> None:
    bounded = resolver({"method": "ficoco-v", "keep": 64}, Bounds(32, ("tome", "ficoco-v")))
    assert resolve(bounded, {"keep": 32})
    for ficoco, words in (
        ({"keep": 31}, "an integer from 32 to 576"),
        ({"kv_budget": 31}, "32.00 to 576.00"),
        ({"method": "evit"}, "allowed: ficoco-v, tome$"),
        ("off", "allowed: tome, ficoco-v"),
    ):
        with pytest.raises(ValueError, match=words):
            resolve(bounded, ficoco)
    bounded.check_raw("vllm_xargs", {"ficoco_keep": 32, "ficoco_method": "tome", "other": 1})
    with pytest.raises(ValueError, match=r"vllm_xargs.ficoco_keep = 3 is not allowed"):
        bounded.check_raw("vllm_xargs", {"ficoco_keep": 3}, entering=48)
    bounded.check_raw("vllm_xargs", {"ficoco_keep": 9}, entering=9)  # all that there is
    with pytest.raises(ValueError, match=r"ficoco.keep = 576 is not allowed; allowed: fewer than all"):
        resolve(bounded, {"keep": 576})
    assert resolve(resolver({"method": "ficoco-v"}, Bounds(1, ("off",))), {"keep": 576})
    with pytest.raises(ValueError, match=r"mm_processor_kwargs.ficoco_method = 'evit'"):
        bounded.check_raw("mm_processor_kwargs", {"ficoco_method": "evit"})
