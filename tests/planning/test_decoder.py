"""Plans: integers that scheduler and workers must agree on, and refused settings."""

import re
from dataclasses import replace
from importlib.metadata import EntryPoint
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import create_model

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.decoder import DecoderPlanner
from ficoco_vllm.planning.segments import Segments
from ficoco_vllm.reduction import Method, get, registry
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS
from ficoco_vllm.request_fields import find_unknown, unknown_field

PATCHES = 576


def planner(num_layers: int = 32, **values: Any) -> DecoderPlanner:
    """A planner for images of 576 tokens."""
    return DecoderPlanner.shared(FicocoConfig.parse({"method": "ficoco-l", **values}), num_layers, PATCHES)


@pytest.mark.parametrize(
    ("method", "ends"),
    [
        # Layers 3, 7, ..., 27 of 32: FiCoCo-L starts at the 4th layer; the last segment has no successor.
        ("ficoco-l", [3, 7, 11, 15, 19, 23, 27]),
        # exactly as its authors do, which takes 16 segments; its schedule removes all in the first
        ("fastv", list(range(1, 31, 2))),
        ("pyramiddrop", [7, 15, 23]),  # its layers 8, 16, 24 rank before they run
        ("sparsevlm", [3, 7, 15]),
        ("fitprune", [3, 7, 11, 15, 19, 23, 27]),
    ],
)
def test_reducing_layers_of_a_32_layer_decoder(method: str, ends: list[int]) -> None:
    result = planner(method=method)
    assert [result.segments.end(segment) for segment in result.reducing_segments(method)] == ends


def deep(num_layers: int = 36, **values: Any) -> DecoderPlanner:
    """A planner of a decoder that adds deepstack features of three levels, after its layers 0 to 2 (Qwen3-VL-8B)."""
    config = FicocoConfig.parse({"method": "ficoco-l", **values})
    return DecoderPlanner.shared(config, num_layers, PATCHES, first_layer=3)


@pytest.mark.parametrize(
    ("method", "ends"),
    [
        ("ficoco-l", [3, 7, 11, 15, 19, 23, 27, 31]),
        ("fastv", [3, 7, 11, 15, 19, 23, 27, 31]),  # after layer 1 of its authors features are still to come
        # In six segments of six layers: layers 8, 16 and 24; layers 3 (for 2), 6 and 15.
        ("pyramiddrop", [5, 17, 23]),
        ("sparsevlm", [5, 17]),
    ],
)
def test_no_token_leaves_before_the_last_deepstack_features(method: str, ends: list[int]) -> None:
    """Neither by the server's own method nor by one that a request names."""
    result = deep(method=method)
    assert [result.segments.end(segment) for segment in result.reducing_segments(method)] == ends
    other = deep(num_segments=36)
    first = [other.segments.end(other.reducing_segments(name)[0]) for name in other.methods]
    assert min(first) == 3
    assert other.counts("fastv", PATCHES, 64) == (*[PATCHES] * 4, *[64] * 32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"start_layer": 2}, "ficoco.start_layer = 2 is not allowed; allowed: layers 3 to 34"),
        ({"method": "sparsevlm", "layers": (2, 9)}, r"ficoco.layers = \(2, 9\) is not allowed; .* deepstack"),
        ({"num_layers": 4, "num_segments": 2}, "no segment of 2 layers ends in one of the layers 3 to 2"),
    ],
)
def test_layers_before_deepstack_features_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deep(**values)


def test_even_one_shot_geometric_and_explicit() -> None:
    assert planner(keep=64).counts("ficoco-l", PATCHES, 64) == (576, 502, 429, 356, 283, 210, 137, 64)
    assert planner(schedule="one-shot").counts("ficoco-l", PATCHES, 64) == (576, *[64] * 7)
    geometric = planner(method="pyramiddrop").counts("pyramiddrop", PATCHES, 72)
    assert geometric == (576, 576, 288, 288, 144, 144, 72, 72)
    explicit = planner(keep=64, schedule=(100, 0, 12, 0, 0, 0, 400))
    assert explicit.counts("ficoco-l", PATCHES, 64) == (576, 476, 476, 464, 464, 464, 464, 64)


def test_an_explicit_schedule_fits_one_budget() -> None:
    explicit = planner(keep=64, schedule=(100, 0, 12, 0, 0, 0, 400))
    assert explicit.plan(PATCHES + 9, [(4, PATCHES)], {"ficoco_keep": 64}).reduces
    with pytest.raises(ValueError, match="ficoco_keep = 65: "):
        explicit.plan(PATCHES + 9, [(4, PATCHES)], {"ficoco_keep": 65})


def test_kv_budget_is_the_average_over_the_layers() -> None:
    """All 576 in the first of 16 segments, so that (16 * 64 - 576) / 15 remain for the other 15."""
    result = planner(method="fastv", kv_budget=64, start_layer=1)
    counts = result.counts("fastv", PATCHES, result.keep)
    assert fmean(counts) <= 64 < fmean(result.counts("fastv", PATCHES, result.keep + 1))
    assert result.keep == 29
    # What docs/decoder-kv.md names for the paper's 64 with FiCoCo-L.
    early = planner(kv_budget=64, schedule="one-shot", start_layer=0, num_segments=32)
    assert early.counts("ficoco-l", 576, early.keep) == (576, *[47] * 31)
    with pytest.raises(ValueError, match=r"kv_budget = 10\.0 is not allowed; allowed: "):
        planner(kv_budget=10.0)


def test_kv_budget_below_the_least_of_the_largest_image() -> None:
    """Where images differ in size it is met by smaller ones; the largest keeps a single token in the end."""
    config = FicocoConfig.parse({"method": "ficoco-l", "kv_budget": 100})
    varied = DecoderPlanner.shared(config, 32, num_visual_tokens=2880, most=2880)
    assert varied.keep == 1
    keep = varied.keep_of(144)
    mean = fmean(varied.counts("ficoco-l", 144, keep))
    assert keep > 1
    assert mean <= 100 < fmean(varied.counts("ficoco-l", 144, keep + 1))
    with pytest.raises(ValueError, match=r"kv_budget = 3000\.0 is not allowed; allowed: above 0 to 2880"):
        DecoderPlanner.shared(config.model_copy(update={"kv_budget": 3000.0}), 32, 2880, 2880)


@settings(max_examples=200, deadline=None)
@given(
    offsets=st.lists(st.integers(0, 40), min_size=0, max_size=3),
    lengths=st.lists(st.integers(1, PATCHES), min_size=3, max_size=3),
    keep=st.integers(1, PATCHES),
    decoded=st.integers(0, 50),
    method=st.sampled_from(["ficoco-l", "fastv", "pyramiddrop", "sparsevlm", "fitprune"]),
)
def test_counts_shrink_to_the_budget(
    offsets: list[int], lengths: list[int], keep: int, decoded: int, method: str
) -> None:
    """For any prompt: never growing, each image down to its own budget, decoded tokens counted in full."""
    images, end = [], 0
    for gap, length in zip(offsets, lengths, strict=False):
        images.append((end + gap, length))
        end += gap + length
    num_prompt = end + 5
    plan = planner().plan(num_prompt, images, {"ficoco_keep": keep, "ficoco_method": method})
    for before, after in zip(plan.counts, plan.counts[1:], strict=False):
        assert all(a <= b for a, b in zip(after, before, strict=True))
    assert list(plan.counts[0]) == [length for _, length in images]
    assert list(plan.counts[-1]) == [min(keep, length) for _, length in images]
    for segment, counts in enumerate(plan.counts):
        text = num_prompt - sum(length for _, length in images)
        assert plan.num_kv_tokens(segment, num_prompt + decoded) == text + sum(counts) + decoded
        assert plan.num_kv_tokens(segment, 0) == 0


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ({"ficoco_keep": 0}, ["ficoco_keep = 0", "1 to 576"]),
        ({"ficoco_keep": 577}, ["ficoco_keep = 577", "1 to 576"]),
        ({"ficoco_keep": "64"}, ["ficoco_keep = '64'", "an integer"]),
        ({"ficoco_keep": 3.5}, ["ficoco_keep = 3.5", "an integer"]),
        ({"ficoco_keep": True}, ["ficoco_keep = True", "an integer"]),
        ({"ficoco_method": "ficoco-v"}, ["ficoco_method = 'ficoco-v'", "ficoco-l", "fastv"]),
    ],
)
def test_requests_that_are_refused(extra: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=next(iter(extra))) as caught:
        planner().plan(600, [(4, PATCHES)], extra)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"num_segments": 5}, ["num_segments = 5", "32 layers", "1, 2, 4, 8, 16, 32"]),
        ({"start_layer": 31}, ["start_layer = 31", "0 to 30"]),
        ({"method": "pyramiddrop", "layers": [8, 31]}, ["layers = (8, 31)", "0 to 30"]),
        ({"compress": "fuse"}, ["fused extra tokens"]),
        ({"local_penalty": True}, ["ficoco.filter and ficoco.correlate by places", "local_penalty"]),
        ({"filter": "one_per_cell"}, ["ficoco.filter and ficoco.correlate by places"]),
        ({"correlate": "same_cell"}, ["ficoco.filter and ficoco.correlate by places"]),
        ({"keep": 577}, ["ficoco_keep = 577", "1 to 576"]),
        ({"schedule": [1, 2]}, ["7 reducing layers need as many counts"]),
    ],
)
def test_settings_that_are_refused(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        planner(**values)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    ("num_layers", "expected"), [(32, 8), (40, 10), (24, 12), (8, 8), (3, 3), (7, 7), (28, 7)]
)
def test_number_of_segments(num_layers: int, expected: int) -> None:
    """Eight, or as many as let one end in the 4th layer."""
    assert planner(num_layers).segments == Segments(num_layers, expected)


def test_two_values_of_the_budget_are_not_allowed() -> None:
    with pytest.raises(ValueError, match="only one is allowed"):
        FicocoConfig.parse({"method": "ficoco-l", "keep": 64, "kv_budget": 64})
    for name in ("kv_budget", "num_segments"):
        with pytest.raises(ValueError, match=f"{name} is allowed for methods of the decoder only"):
            FicocoConfig.parse({"method": "ficoco-v", name: 4})
    with pytest.raises(ValueError, match="encoder = "):
        FicocoConfig.parse({"method": "ficoco-l", "encoder": {"keep": 64}})


def test_the_tower_of_a_pipeline() -> None:
    config = FicocoConfig.parse({"method": "ficoco-vl", "keep": 64})
    assert config.decoder_method is not None
    assert config.tower_part(PATCHES) == FicocoConfig.parse({"method": "ficoco-v", "keep": 192})
    chosen = FicocoConfig.parse({"method": "ficoco-vl", "encoder": {"keep": 300, "lam": 0.5}})
    assert chosen.tower_part(PATCHES) == FicocoConfig.parse({"method": "ficoco-v", "keep": 300, "lam": 0.5})
    assert FicocoConfig.parse({"method": "fastv"}).tower_part(PATCHES).method is None


def test_a_trace_changes_no_plan() -> None:
    image = [(1, PATCHES)]
    plain = planner().plan(PATCHES + 9, image, {"ficoco_keep": 64})
    assert planner(explain=True).plan(PATCHES + 9, image, {"ficoco_keep": 64, "ficoco_trace": 5}) == plain


def test_fields_that_a_server_does_not_know() -> None:
    """Checked by processor and admission when a request arrives."""
    assert find_unknown(["other", "ficoco_keep", "ficoco_method"], explain=False) is None
    assert find_unknown(["ficoco_kep"], explain=True) == "ficoco_kep"
    assert find_unknown(["ficoco_trace"], explain=False) == "ficoco_trace"
    assert find_unknown(["ficoco_trace"], explain=True) is None
    assert unknown_field("ficoco_kep").startswith(
        "ficoco_kep is not a field of this server; allowed: ficoco_keep"
    )


def test_all_that_enters_may_be_kept() -> None:
    """A request whose tower keeps more than the server's may keep all of it in the decoder too."""
    result = DecoderPlanner.shared(FicocoConfig.parse({"method": "ficoco-vl", "keep": 64}), 32, 192)
    assert not result.plan(PATCHES + 9, [(1, PATCHES)], {"ficoco_keep": PATCHES}).reduces
    with pytest.raises(
        ValueError, match="ficoco_keep = 193 is not allowed; allowed: an integer from 1 to 192"
    ):
        result.plan(200, [(1, 192)], {"ficoco_keep": 193})


# The settings of FiCoCo-L's filter, with the penalty by windows of the image on.
Penalty = create_model("Penalty", __base__=get("ficoco-l").filter.settings, local_penalty=(bool, True))


def other_method(name: str, **changed: Any) -> Method:
    """A method of another package: FastV with some stages or settings replaced."""
    return replace(get("fastv"), name=name, **changed)


THIRD_PARTY = {
    "by-attention": other_method("by-attention"),
    "by-place": other_method("by-place", filter=FILTERS["one_per_cell"]),
    "same-place": other_method("same-place", correlate=CORRELATIONS["same_cell"]),
    "with-penalty": other_method("with-penalty", filter=replace(get("ficoco-l").filter, settings=Penalty)),
    "with-extra": other_method("with-extra", compress=COMPRESSIONS["fuse"]),
    "by-cls": other_method("by-cls", filter=FILTERS["cls_attention"]),
}


def test_a_method_of_another_package_is_held_to_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a request names it, on a server that was started with another one."""
    entries = {name: EntryPoint(name, name, "ficoco_vllm.reductions") for name in THIRD_PARTY}
    monkeypatch.setattr(EntryPoint, "load", lambda entry: THIRD_PARTY[entry.name])
    monkeypatch.setattr(registry, "_entry_points", lambda: entries)
    result = planner(keep=63)  # a separate configuration: planners are cached
    image = [(4, PATCHES)]
    assert result.plan(600, image, {"ficoco_method": "by-attention"}).counts[-1] == (63,)
    for name in THIRD_PARTY.keys() - {"by-attention"}:
        with pytest.raises(ValueError, match=f"ficoco_method = '{name}' is not a method .* by-attention"):
            result.plan(600, image, {"ficoco_method": name})
        with pytest.raises(ValueError, match=r"by places|fused extra|cls_attention"):
            planner(method=name)
