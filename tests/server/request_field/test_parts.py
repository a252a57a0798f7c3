"""From the field `ficoco` to the arguments of processor and decoder, without a server."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.exceptions import GenerationError, RetryableRequestError, VLLMValidationError

from ficoco_vllm import demo_model
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.processing import ReducingInfo
from ficoco_vllm.request_fields import find_misplaced, misplaced
from ficoco_vllm.server.explain.served_model import default_keep
from ficoco_vllm.server.request_field.apply import FieldApplier, _in_terms_of
from ficoco_vllm.server.request_field.resolve import UNBOUNDED, Bounds, Resolver
from ficoco_vllm.server.request_field.schema import FicocoRequest, parse
from tests.planning.test_qwen3_vl import plan as qwen3_vl_plan


def resolver(settings: dict[str, Any], bounds: Bounds = UNBOUNDED) -> Resolver:
    """Resolver of a server of the demo model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo_model.path())
    return Resolver(ServerPlan.of(FicocoConfig.parse(settings), config), bounds)


def resolve(resolver: Resolver, ficoco: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of processor and decoder."""
    requested = parse(ficoco, resolver.allowed)
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


def test_kv_budget_of_images_that_differ_in_size() -> None:
    """The server may start with an average that only smaller images reach; a request is told whose range it left."""
    served = Resolver(qwen3_vl_plan(method="ficoco-l", kv_budget=100), UNBOUNDED)
    with pytest.raises(
        ValueError, match=r"ficoco.kv_budget = 100 .* to 16384.00, for the largest image; .*keep"
    ):
        resolve(served, {"kv_budget": 100})


def test_a_share_of_the_tokens() -> None:
    tower = resolver({"method": "ficoco-v", "keep": 64}, Bounds(32, ("tome", "ficoco-v")))
    assert resolve(tower, {"keep_ratio": 0.25, "method": "tome"}) == (
        {"ficoco_method": "tome", "ficoco_keep_ratio": 0.25},
        {},
    )
    for ficoco, words in (
        (
            {"keep_ratio": 0.05},
            r"ficoco.keep_ratio = 0.05 is not allowed; allowed: a number from 0.0556 to 1$",
        ),
        ({"keep_ratio": 1.0}, "fewer than all, which would be 'off'"),
        ({"keep_ratio": 0}, r"ficoco.keep_ratio = 0 is not allowed; allowed: a number above 0, at most 1"),
        ({"keep_ratio": True}, "ficoco.keep_ratio = True is not allowed"),
        (
            {"keep_ratio": 0.5, "keep": 64},
            r"ficoco.keep_ratio = 0.5 together with ficoco.keep = 64 is not allowed",
        ),
    ):
        with pytest.raises((ValueError, VLLMValidationError), match=words):
            resolve(tower, ficoco)
    with pytest.raises(ValueError, match=r"mm_processor_kwargs.ficoco_keep_ratio = 0.05 is not allowed"):
        tower.check_raw("mm_processor_kwargs", {"ficoco_keep_ratio": 0.05})
    with pytest.raises(
        ValueError, match=r"ficoco.keep_ratio = 0.5 .*reduces in the decoder; allowed: ficoco.keep$"
    ):
        resolve(resolver({"method": "ficoco-l"}), {"keep_ratio": 0.5})


def dynamic(settings: dict[str, Any], bounds: Bounds) -> Resolver:
    """Resolver of a server of a Qwen3-VL-8B."""
    vision = SimpleNamespace(
        depth=27, patch_size=16, spatial_merge_size=2, deepstack_visual_indexes=[8, 16, 24]
    )
    text = SimpleNamespace(num_hidden_layers=36)
    config = SimpleNamespace(model_type="qwen3_vl", vision_config=vision, get_text_config=lambda: text)
    return Resolver(ServerPlan.of(FicocoConfig.parse(settings), config), bounds)


def test_a_share_keeps_the_fewest_tokens_of_every_image() -> None:
    server = dynamic({"method": "divprune"}, Bounds(32))
    tower = server.plan.tower

    def check(ratio: float, *sizes: tuple[int, int]) -> None:
        server.check_images("ficoco.keep_ratio", tower.budget(None, None, ratio), sizes)

    check(0.1, (1024, 1024))  # 102 of 1024 units
    check(1.0, (64, 96))  # all of an image that has fewer
    with pytest.raises(ValueError, match=r"0.1 .* of the 256 .* 512 x 512 .* keeps 26.* from 0.1250 to 1$"):
        check(0.1, (1024, 1024), (512, 512))
    check(0.125, (512, 512))


@pytest.mark.parametrize(
    ("settings", "methods", "reason"),
    [
        ("divprune", ("divprune",), "the operator has chosen others"),
        ("ficoco-l", None, "it works before the vision tower, and this server reduces in the decoder"),
    ],
)
def test_why_a_model_with_dynamic_resolution_does_not_downscale(
    settings: str, methods: tuple[str, ...] | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"'downscale' is not allowed, since {reason}"):
        resolve(dynamic({"method": settings}, Bounds(1, methods)), {"method": "downscale"})


def test_a_budget_of_a_request_replaces_one_of_the_operators_arguments() -> None:
    def merged(served: dict[str, Any], requested: dict[str, Any]) -> dict[str, Any]:
        context = SimpleNamespace(get_merged_mm_kwargs=lambda own: {**served, **own})
        return ReducingInfo._merged(cast(Any, SimpleNamespace(ctx=context)), requested)

    assert merged({"ficoco_keep": 9}, {"ficoco_keep_ratio": 0.5}) == {"ficoco_keep_ratio": 0.5}
    assert merged({"ficoco_keep_ratio": 0.5}, {"ficoco_keep": 9}) == {"ficoco_keep": 9}
    assert merged({"ficoco_keep": 9}, {"ficoco_method": "tome"}) == {
        "ficoco_keep": 9,
        "ficoco_method": "tome",
    }
    both = {"ficoco_keep": 9, "ficoco_keep_ratio": 0.5}  # refused as a pair
    assert merged({}, both) == both


def test_the_budget_of_a_server_that_follows_each_image() -> None:
    for method in ("divprune", "ficoco-l"):
        assert default_keep(dynamic({"method": method}, UNBOUNDED).plan) is None
        assert default_keep(dynamic({"method": method, "keep": 64}, UNBOUNDED).plan) == 64
        assert default_keep(resolver({"method": method}).plan) == 64


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
        ({"method": "evit"}, "chosen others .--ficoco-allow-methods.; allowed: ficoco-v, tome$"),
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


@pytest.mark.parametrize("keep", [0, -3, 577, "64", 64.5, True, [64], None])
@pytest.mark.parametrize("method", ["ficoco-v", "ficoco-l", "ficoco-vl"])
def test_a_budget_out_of_range_is_refused_with_the_range(method: str, keep: Any) -> None:
    server = resolver({"method": method, "keep": 64}, Bounds(4))
    if keep is None:  # as if it were not there
        assert resolve(server, {"keep": None}) == ({}, {})
        return
    with pytest.raises((ValueError, VLLMValidationError)) as caught:
        resolve(server, {"keep": keep})
    assert f"ficoco.keep = {keep!r} is not allowed; allowed: an integer from 4 to 576" in str(caught.value)


@pytest.mark.parametrize("kv_budget", [0, -1, "64", float("nan"), 577])
def test_an_average_out_of_range_is_refused_with_the_range(kv_budget: Any) -> None:
    with pytest.raises((ValueError, VLLMValidationError), match=r"allowed: 1.00 to 576.00"):
        resolve(resolver({"method": "ficoco-v"}), {"kv_budget": kv_budget})


@pytest.mark.parametrize(
    ("server", "name", "reason"),
    [
        ("ficoco-v", "fastv", "it reduces in the decoder, and this server in the vision tower"),
        ("ficoco-v", "ficoco-vl", "it reduces twice, for which a server is started with it"),
        ("ficoco-l", "ficoco-v", "it reduces in the vision tower, and this server in the decoder"),
        ("ficoco-l", "tome", "it reduces in the vision tower, and this server in the decoder"),
        ("ficoco-vl", "ficoco-v", "this server reduces twice, by ficoco-vl"),
        ("ficoco-v", "downscale", "it needs a model with dynamic resolution"),
        ("ficoco-v", "magic", None),
        ("ficoco-vl", "magic", None),
    ],
)
def test_a_method_that_is_not_served_here_is_refused_with_the_reason(
    server: str, name: str, reason: str | None
) -> None:
    since = "" if reason is None else f", since .*{reason}.*"
    with pytest.raises(
        ValueError, match=rf"^ficoco.method = '{name}' is not allowed{since}; allowed: .*ficoco-"
    ):
        resolve(resolver({"method": server}), {"method": name})


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, None),
        ({"ficoco": {"keep": 9}}, None),
        ({"extra_body": {"top_k": 5}, "metadata": None, "tools": [{"ficoco": 1}]}, None),
        ({"extra_body": {"ficoco": {"keep": 9}}}, "extra_body.ficoco"),
        ({"ficoco": "off", "extra_body": {"ficoco": "off"}}, "extra_body.ficoco"),
        ({"additional_config": {"ficoco": {"method": "tome"}}}, "additional_config.ficoco"),
        ({"extra_args": {"ficoco": {}}}, "extra_args.ficoco"),
        ({"mm_processor_kwargs": {"ficoco": {"keep": 9}}}, "mm_processor_kwargs.ficoco"),
        ({"vllm_xargs": {"ficoco": "off"}}, "vllm_xargs.ficoco"),
        ({"ficoco_keep": 9}, "ficoco_keep"),
        ({"FiCoCo": {"keep": 9}}, "FiCoCo"),
        ({"ficoco-method": "tome"}, "ficoco-method"),
    ],
)
def test_the_field_in_another_place(body: dict[str, Any], path: str | None) -> None:
    assert find_misplaced(body) == path
    if path is not None:
        assert misplaced(path).startswith(f"{path} is not read; allowed: ficoco at the top level")


def test_errors_about_arguments_that_we_wrote_are_in_the_client_s_words() -> None:
    error = VLLMValidationError("ficoco_keep = 1: no schedule", parameter="ficoco_keep")
    ours = _in_terms_of(FicocoRequest(keep=1), error)
    assert (ours.args[0], ours.parameter) == ("ficoco.keep = 1: no schedule", "ficoco.keep")
    assert _in_terms_of(None, error) is error
    twice = VLLMValidationError("mm_processor_kwargs.ficoco_keep together with ficoco is not allowed")
    assert _in_terms_of(FicocoRequest(keep=1), twice).args[0] == twice.args[0]


@pytest.mark.parametrize(
    ("fields", "error", "blamed"),
    [
        ({"allowed_token_ids": [5], "structured_outputs": {"regex": "a"}}, GenerationError, "allowed_token_ids"),
        ({"bad_words": ["a"], "min_tokens": 2, "response_format": {}, "tools": [1]}, GenerationError, "bad_words, "),
        ({"allowed_token_ids": [5]}, GenerationError, None),
        ({"structured_outputs": {"regex": "a"}}, GenerationError, None),
        ({"allowed_token_ids": [5], "structured_outputs": {"regex": "a"}}, RetryableRequestError, None),
    ],
)  # fmt: skip
def test_an_answer_for_which_no_token_is_left_is_the_client_s_fault(
    fields: dict[str, Any], error: type[GenerationError], blamed: str | None
) -> None:
    async def answer(request: Any, raw_request: Any) -> None:
        raise error

    applier = FieldApplier(resolver({"keep": 64}), Any, 0, None)
    with pytest.raises(error if blamed is None else VLLMValidationError) as caught:
        asyncio.run(applier._handle(answer, SimpleNamespace(model_extra={}, **fields)))
    assert blamed is None or caught.value.parameter.startswith(blamed)
