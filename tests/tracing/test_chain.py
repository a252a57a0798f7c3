"""A trace read layer by layer, and shares followed through all layers."""

from typing import Any

import pytest
import torch

from ficoco_vllm.reduction import Signals, get
from ficoco_vllm.reduction.testing import make_signals, make_tokens
from ficoco_vllm.request_fields import MAX_TRACE_ID, check_trace_id
from ficoco_vllm.tracing.chain import Step, destinations, read_steps
from ficoco_vllm.tracing.store import Traces

NUM_PATCHES = 36
TRACE_ID = 7


def layers_of(
    method: str, removals: list[int], site: str = "encoder", **settings: Any
) -> list[dict[str, Any]]:
    """The trace of several reductions one after the other, of the second image of a batch."""
    traces = Traces()
    reducer = get(method).configure(**settings)
    tokens, size, position = make_tokens(2, NUM_PATCHES), None, torch.arange(NUM_PATCHES).expand(2, -1)
    for layer, num_removed in enumerate(removals):
        rendered = make_signals(2, tokens.shape[1], seed=layer)
        signals = Signals(**{**vars(rendered), "position": position, "grid": (6, 6), "features": None})
        observer = traces.observer(site, layer, {1: TRACE_ID})
        tokens, size, position = reducer(tokens, signals, num_removed, size, observer=observer)
    return traces.take(TRACE_ID)


def total_by_matrices(steps: list[Step]) -> torch.Tensor:
    """(tokens in the end, patches) share of each patch in each token, by products of one matrix a layer."""
    names = list(range(NUM_PATCHES))
    total = torch.eye(NUM_PATCHES, dtype=torch.float64)
    for step in steps:
        flow = torch.zeros(len(step.kept), len(names), dtype=torch.float64)
        for row, name in enumerate(step.kept):
            if name in names:
                flow[row, names.index(name)] = 1.0
        for departure in step.left:
            for name, share in departure.targets:
                flow[step.kept.index(name), names.index(departure.token)] = share
        total, names = flow @ total, list(step.kept)
    return total


@pytest.mark.parametrize(
    ("method", "removals", "settings"),
    [
        ("ficoco-v", [8, 8, 8], {"epsilon": 0.9}),
        ("ficoco-v", [8, 8, 8], {}),
        ("ficoco-v", [20], {}),
        ("ficoco-v", [8, 8], {"fixed_k": 0}),
        ("tome", [10, 10, 5], {}),
        ("evit", [8, 8, 8], {}),
        ("topk-cls", [27], {}),
    ],
)
def test_shares_over_all_layers(method: str, removals: list[int], settings: dict[str, Any]) -> None:
    steps = read_steps(layers_of(method, removals, **settings), [NUM_PATCHES])
    assert [step.layer for step in steps] == list(range(len(removals)))
    result = destinations(steps)
    fused = {name for step in steps for name in step.kept if name >= NUM_PATCHES}
    last = steps[-1].kept
    gone = set(range(NUM_PATCHES)) | fused
    assert [item.token for item in result] == sorted(gone - set(last))
    expected = total_by_matrices(steps)
    for item in result:
        row = torch.zeros(len(last), dtype=torch.float64)
        for name, share in item.targets:
            row[last.index(name)] = share
        assert sum(share for _, share in item.targets) + item.lost == pytest.approx(1, abs=1e-5)
        if item.token < NUM_PATCHES:
            torch.testing.assert_close(row, expected[:, item.token], rtol=0, atol=1e-9)


def test_what_patches_bring_is_what_the_reduction_counts() -> None:
    """The sizes that the reduction itself carries along are the sums of all shares."""
    steps = read_steps(layers_of("ficoco-v", [8, 8, 8], epsilon=0.9), [NUM_PATCHES])
    held = dict.fromkeys(steps[-1].kept, 1.0)
    for item in destinations(steps):
        for name, share in item.targets:
            held[name] += share
    assert list(held.values()) == pytest.approx(list(steps[-1].sizes), abs=1e-4)
    assert sum(held.values()) == pytest.approx(NUM_PATCHES, abs=1e-3)


def test_names_are_the_positions_of_the_engine() -> None:
    trace = layers_of("evit", [8, 8])
    for layer, step in zip(trace, read_steps(trace, [NUM_PATCHES]), strict=True):
        assert layer["position"] == [name if name < NUM_PATCHES else -1 for name in step.kept]
        assert step.num_fused == 1


def test_a_trace_goes_on_in_the_decoder() -> None:
    """There the tokens are those that left the tower, perhaps after a [CLS]."""
    tower = layers_of("ficoco-v", [NUM_PATCHES - 9])
    decoder = {"site": "decoder", "layer": 3, "tile": 0, "rows": [0], "columns": [1], "values": [1.0]}
    without = {**decoder, "source": [2], "target": [0, 1, *range(3, 9)], "size": [1.0] * 8, "position": []}
    first, second = read_steps([*tower, without], [NUM_PATCHES])
    assert second.left[0].token == first.kept[2]
    assert second.left[0].targets == ((first.kept[1], 1.0),)
    with_cls = {**decoder, "source": [2], "target": [0, 1, *range(3, 10)], "size": [1.0] * 9, "position": []}
    first, second = read_steps([*tower, with_cls], [NUM_PATCHES])
    assert second.kept[0] == NUM_PATCHES
    assert second.left[0].token == first.kept[1]


def test_nothing_left() -> None:
    assert read_steps([], [NUM_PATCHES]) == []
    assert destinations([]) == []


def test_a_gap_is_an_error() -> None:
    trace = layers_of("ficoco-v", [8, 8, 8])
    with pytest.raises(ValueError, match="incomplete: encoder layer 2 has 20 tokens, and 28 came before"):
        read_steps([trace[0], trace[2]], [NUM_PATCHES])


def test_the_oldest_traces_make_room() -> None:
    traces = Traces(max_traces=3)
    reducer = get("ficoco-v").configure()
    for trace_id in (1, 2, 3, 1, 4):
        observer = traces.observer("encoder", 0, {0: trace_id})
        reducer(make_tokens(1, 16), make_signals(1, 16), 4, observer=observer)
    assert [len(traces.take(trace_id)) for trace_id in (1, 2, 3, 4)] == [1, 0, 1, 1]
    assert traces.take(1) == []


def test_a_request_that_comes_by_twice_is_recorded_once() -> None:
    traces = Traces()
    reducer = get("ficoco-v").configure()
    for _ in range(2):
        reducer(make_tokens(1, 16), make_signals(1, 16), 4, observer=traces.observer("decoder", 3, {0: 5}))
    assert len(traces.take(5)) == 1


def test_no_observer_where_nothing_is_traced() -> None:
    assert Traces().observer("encoder", 0, {}) is None


@pytest.mark.parametrize("value", [True, -1, MAX_TRACE_ID + 1, "1", 1.5, None])
def test_a_mark_that_is_not_one(value: Any) -> None:
    with pytest.raises(ValueError, match=r"ficoco_trace = .* allowed: an integer from 0 to"):
        check_trace_id(value)


def test_a_mark() -> None:
    assert check_trace_id(5) == check_trace_id(5.0) == 5
