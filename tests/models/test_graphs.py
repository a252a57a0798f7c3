"""Graphs of the tower, captured and replayed by vLLM's own manager: on a CPU, with noted calls for graphs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.models.interfaces import supports_encoder_cudagraph
from vllm.v1.worker import encoder_cudagraph
from vllm.v1.worker.encoder_cudagraph import EncoderCudaGraphManager

from ficoco_vllm.config import NAME
from ficoco_vllm.reduction import signals
from tests.models.conftest import Pair
from tests.support.engine import worker_of
from tests.support.graphs import Graph, install

pytestmark = [pytest.mark.compat, pytest.mark.engine]

# Sums in another order: graphs are filled up to 1, 2 or 3 images.
CLOSE = 2e-5


@pytest.fixture
def model(random_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The served LLaVA, FiCoCo-V with 64 tokens, of which graphs of 192 are requested beside."""
    install(monkeypatch.setattr)
    monkeypatch.setattr(encoder_cudagraph, "current_stream", lambda: None)
    model = worker_of(random_pair[0]).model_runner.get_model()
    monkeypatch.setitem(getattr(model.config, NAME), "graph_budgets", [192])
    monkeypatch.delitem(model.__dict__, "graph_budgets", raising=False)
    yield model
    model.__dict__.pop("graph_budgets", None)


@pytest.fixture
def manager(model: Any, random_pair: Pair) -> EncoderCudaGraphManager:
    """Manager of vLLM's, everything captured."""
    assert supports_encoder_cudagraph(model)
    config = random_pair[0].llm_engine.vllm_config
    manager = EncoderCudaGraphManager(config, torch.device("cpu"), torch.float32, model)
    manager.capture((0, 0))
    return manager


def step(model: Any, budgets: list[tuple[str, int]], seed: int) -> dict[str, Tensor]:
    """Fields of a step of images."""
    torch.manual_seed(seed)
    return {
        "pixel_values": torch.randn(len(budgets), 3, 192, 192),
        "ficoco_keep": torch.tensor([keep for _, keep in budgets]),
        "ficoco_method": torch.tensor([model.planner.method_index(method) for method, _ in budgets]),
    }


MIXED = [
    *[("ficoco-v", 64)] * 2,
    ("ficoco-v", 192),
    ("ficoco-v", 576),
    ("tome", 576),  # nothing is removed: the whole tower, whatever the method
    ("ficoco-v", 100),  # not captured
    ("tome", 64),  # not captured
    *[("ficoco-v", 64)] * 3,
]


def test_what_is_captured(model: Any, manager: EncoderCudaGraphManager) -> None:
    assert manager.token_budgets == [1, 2, 3], "2048 batched tokens are three images"
    assert {path: sorted(captured) for path, captured in manager.budget_graphs.items()} == {
        path: [1, 2, 3] for path in ("whole", "ficoco-v 64", "ficoco-v 192")
    }


@torch.inference_mode()
def test_replay_equals_eager(
    model: Any, manager: EncoderCudaGraphManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of mixed budgets, after a capture with blank images: choices follow the data of each replay."""
    eager: list[int] = []
    embed = model.embed_multimodal
    outputs = []
    for seed in (0, 1):
        given = step(model, MIXED, seed)
        expected = embed(**given)
        with monkeypatch.context() as patched:

            def counted(**batch: Tensor) -> Any:
                eager.append(len(batch["pixel_values"]))
                return embed(**batch)

            patched.setattr(model, "embed_multimodal", counted)
            outputs.append((manager.execute(given), expected))
    for replayed, expected in outputs:  # the second step has not written over the results of the first
        for index, (one, other) in enumerate(zip(replayed, expected, strict=True)):
            error = float((one - other).abs().max())
            assert error < CLOSE, (MIXED[index], error)
    assert sum(eager) == 2 * 2, "what is not captured, and nothing else, runs eagerly"
    assert Graph.replays >= 2 * 3


@torch.inference_mode()
def test_a_choice_of_the_capture_would_show(
    model: Any, manager: EncoderCudaGraphManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: a graph whose tokens were chosen on the host at capture keeps those of the blank images."""
    given = step(model, [("ficoco-v", 64)], 0)
    (expected,) = model.embed_multimodal(**given)
    plain = signals.partition

    def frozen(redundancy: Tensor, num_removed: int, backend: Any) -> Any:
        parts = plain(redundancy, num_removed, backend)
        return type(parts)(*(torch.tensor(part.tolist()) for part in parts))

    monkeypatch.setattr("ficoco_vllm.reduction.method.partition", frozen)
    manager.capture((0, 0))
    (replayed,) = manager.execute(given)
    assert (replayed - expected).abs().max() > 100 * CLOSE


@torch.inference_mode()
def test_traced_images_and_embeddings_run_eagerly(model: Any, manager: EncoderCudaGraphManager) -> None:
    given = step(model, [("ficoco-v", 64)] * 2, 0)
    traced = manager.execute({**given, "ficoco_trace": torch.tensor([7, 8])})
    for one, other in zip(traced, model.embed_multimodal(**given), strict=True):
        torch.testing.assert_close(one, other, atol=CLOSE, rtol=0)
    assert model.traces.take(7)
    model.traces.take(8)
    embeddings = torch.randn(2, 64, model.config.text_config.hidden_size)
    assert torch.equal(torch.stack(manager.execute({"image_embeds": embeddings})), embeddings)
    assert Graph.replays == 0


def test_reductions_in_graphs_are_not_timed(
    model: Any, manager: EncoderCudaGraphManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event that a capture records cannot be read."""
    seen = []
    stopwatch, embed = model.stopwatch, model.embed_budget

    def embedded(*given: Any) -> Any:
        seen.append(model.stopwatch)
        return embed(*given)

    monkeypatch.setattr(model, "embed_budget", embedded)
    manager.capture((0, 0))
    assert seen
    assert not any(seen)
    assert model.stopwatch is stopwatch


def test_a_budget_that_cannot_be_met_is_named(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(getattr(model.config, NAME), "graph_budgets", [577])
    with pytest.raises(ValueError, match="577"):
        model.get_encoder_cudagraph_config()


def test_budgets_of_vllm_count_images(model: Any) -> None:
    with pytest.raises(ValueError, match="4096 is not allowed; allowed: numbers of images from 1 to 32"):
        model.prepare_encoder_cudagraph_capture_inputs(
            4096, 8, 0, torch.device("cpu"), torch.float32, "whole"
        )


@pytest.mark.parametrize(("tokens", "most"), [(16384, 8), (1200, 2), (100, 1)])
def test_a_graph_holds_no_more_than_a_step(model: Any, tokens: int, most: int) -> None:
    config: Any = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens))
    assert model.get_encoder_cudagraph_budget_range(config) == (1, most)
