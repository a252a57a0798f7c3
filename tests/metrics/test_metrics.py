"""Accounts of requests, bulk observation, the stopwatch, and the switch."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, Histogram
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from ficoco_vllm.config import DEFAULT_METHOD, FicocoConfig
from ficoco_vllm.metrics.families import observe_all
from ficoco_vllm.metrics.savings import Savings, SavingsPlanner
from ficoco_vllm.metrics.stopwatch import Stopwatch
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.planning.tower import Budget
from ficoco_vllm.reduction import cost
from ficoco_vllm.request_fields import BUDGET
from ficoco_vllm.server.commands.serve import resolve_settings
from ficoco_vllm.server.commands.serve_options import read_options
from ficoco_vllm.server.lifecycle.shared_metrics import MULTIPROC, shared_metrics

pytestmark = pytest.mark.compat

LLAVA = cost.model_shape(cost.KNOWN_MODELS["llava-hf/llava-1.5-7b-hf"])


def savings_planner(method: str, **settings: Any) -> SavingsPlanner:
    return SavingsPlanner(
        ServerPlan.for_model(FicocoConfig.parse({"method": method, **settings}), LLAVA), LLAVA
    )


def savings(of: SavingsPlanner, num_text: int, *lengths: int, **kwargs: Any) -> Savings:
    """Savings of a prompt with images of these lengths, then text."""
    images = [(sum(lengths[:index]), length) for index, length in enumerate(lengths)]
    budget = kwargs.get("budget", of.plan.tower.default)
    return of.compute(num_text + sum(lengths), images, budget, kwargs.get("extra_args"))


@pytest.mark.parametrize("method", ["ficoco-v", "tome", "topk-cls", "visionzip"])
@pytest.mark.parametrize("num_text", [1, 2, 3, 60, 1000])
@pytest.mark.parametrize("num_images", [1, 3])
def test_tower(method: str, num_text: int, num_images: int) -> None:
    """Equal to the cost of the plan at each length of text."""
    of = savings_planner(method, keep=64)
    result = savings(of, num_text, *[64] * num_images)
    assert result.method == method
    assert (result.visual_tokens_in, result.visual_tokens_kept) == (num_images * 576, num_images * 64)
    assert result.budgets == (64,) * num_images
    assert result.missing == (num_images * 512,)
    stock, reduced = (
        cost.estimate(LLAVA, plan, num_text_tokens=num_text, num_images=num_images)
        for plan in (cost.unreduced(LLAVA), of.plan.image_tokens())
    )
    assert result.flops_avoided == stock.total_flops - reduced.total_flops > 0


def test_tower_keeps_all_or_text_only() -> None:
    of = savings_planner("ficoco-v", keep=64)
    everything = savings(of, 60, 576, budget=Budget("ficoco-v", 576))
    assert everything == Savings("off", 576, 576, (576,), (0,), 0)
    assert savings(of, 60) == Savings("text")
    embeddings = savings(of, 60, 100, budget=None)
    assert embeddings == Savings("off", 100, 100, (100,), (0,), 0)
    assert savings(of, 60, 100, budget=Budget("tome", 100)).method == "tome"


@pytest.mark.parametrize("schedule", ["even", "one-shot"])
def test_decoder(schedule: str) -> None:
    of = savings_planner("ficoco-l", keep=64, schedule=schedule)
    result = savings(of, 60, 576, 576)
    assert of.plan.decoder is not None
    counts = of.plan.decoder.counts("ficoco-l", 576, 64)
    assert result.method == "ficoco-l"
    assert result.missing == tuple(2 * (576 - count) for count in counts)
    assert (result.visual_tokens_in, result.visual_tokens_kept) == (1152, 128)
    # Tokens leave between attention and MLP of a segment's last layer, which the cost model counts by layers.
    plan = cost.TokenPlan.whole((576,) * 24, (*np.repeat(counts, 4).tolist(), counts[-1]))
    assert of.plan.image_tokens() == plan
    stock, reduced = (
        cost.estimate(LLAVA, tokens, num_text_tokens=60, num_images=2)
        for tokens in (cost.unreduced(LLAVA), plan)
    )
    assert result.flops_avoided == stock.total_flops - reduced.total_flops > 0


def test_what_the_prefix_cache_held_counts_for_nothing() -> None:
    """The second of two windows counts like a separate prompt."""
    of = savings_planner("ficoco-l", keep=64, windows="turn", window_tokens=700)
    assert of.plan.decoder is not None
    prompt = (1300, [(20, 576), (650, 576)], of.plan.tower.default, {"ficoco_window": [640.0, 1290]})
    whole = of.compute(*prompt)
    rest = of.of_rest(640, whole, *prompt, ())
    alone = of.compute(660, [(10, 576)], of.plan.tower.default, {"ficoco_window": [650]})
    assert rest == alone
    assert rest.visual_tokens_in == 576
    assert 0 < rest.flops_avoided < whole.flops_avoided
    # Only text before the images was cached, or all of them.
    assert of.of_rest(16, whole, *prompt, ()).missing == whole.missing
    assert of.of_rest(1280, whole, *prompt, ()) == Savings("ficoco-l")


def test_a_prompt_carries_its_savings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The response and the metrics share one computation; another budget in the decoder is another one."""
    of, calls = savings_planner("ficoco-l", keep=64), list[Any]()
    original = SavingsPlanner.compute

    def counted(*args: Any) -> Savings:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(SavingsPlanner, "compute", counted)
    prompt: dict[str, Any] = {"prompt_token_ids": [0] * 636, BUDGET: of.plan.tower.default}
    response = of.of_prompt(prompt, [(20, 576)], {})
    assert of.of_prompt(prompt, [(20, 576)], {"ficoco_window": [636]}) is response
    assert len(calls) == 1
    assert of.of_prompt(prompt, [(20, 576)], {"ficoco_keep": 9}).budgets == (9,)
    assert of.of_prompt({"prompt_token_ids": [0] * 60}, [], None) == Savings("text")


def test_one_accountant_serves_api_and_metrics() -> None:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, num_hidden_layers=24),
        text_config=LlamaConfig(),
    )
    config.ficoco = {"method": "ficoco-l", "keep": 64}
    assert SavingsPlanner.of(config) is SavingsPlanner.of(config)


def test_both() -> None:
    of = savings_planner("ficoco-vl", keep=64)
    result = savings(of, 60, 192)
    assert result.method == "ficoco-vl"
    assert (result.visual_tokens_in, result.visual_tokens_kept) == (576, 64)
    assert result.missing[0] == 576 - 192
    assert result.missing[-1] == 576 - 64
    assert result.flops_avoided > savings(of, 60, 192, extra_args={"ficoco_keep": 192}).flops_avoided > 0
    assert savings(of, 60, 192, extra_args={"ficoco_keep": 192}).method == "ficoco-v"
    other = savings(of, 60, 192, budget=Budget("tome", 192), extra_args={"ficoco_method": "fastv"})
    assert other.method == "tome+fastv"
    only_late = savings(of, 60, 576, budget=Budget("ficoco-v", 576), extra_args={"ficoco_keep": 64})
    assert only_late.method == "ficoco-l"


def test_bulk_observation_equals_one_by_one() -> None:
    registry = CollectorRegistry()
    bulk = Histogram("bulk", "", ("a",), buckets=(0.1, 0.5, 1.0), registry=registry).labels("x")
    single = Histogram("single", "", ("a",), buckets=(0.1, 0.5, 1.0), registry=registry).labels("x")
    values = [0.05, 0.1, 0.100001, 0.5, 0.7, 1.0, 3.0, 3.0]
    observe_all(bulk, values)
    observe_all(bulk, [])
    for value in values:
        single.observe(value)
    samples = [
        [(s.name, s.labels, s.value) for s in histogram._samples() if s.name != "_created"]
        for histogram in (bulk, single)
    ]
    assert samples[0] == samples[1]


def test_stopwatch_adds_up() -> None:
    reported: list[tuple[str, float]] = []
    watch = Stopwatch(lambda label, seconds: reported.append((label, seconds)))
    lap = watch.lap("tome", torch.device("cpu"))
    for _ in range(2):
        with lap.running():
            time.sleep(0.02)
        time.sleep(0.5)
    assert reported == []
    watch.hand_in(lap)
    assert [label for label, _ in reported] == ["tome"]
    assert 0.04 <= reported[0][1] < 0.5  # without the time between


def test_stopwatch_never_waits_for_the_device() -> None:
    """A lap whose events have not passed is reported later, and laps are reported in order."""
    reported: list[str] = []
    watch = Stopwatch(lambda label, seconds: reported.append(label))
    laps = [watch.lap(label, torch.device("cpu")) for label in ("first", "second")]

    class Event:
        passed = False

        def query(self) -> bool:
            return self.passed

        def elapsed_time(self, end: "Event") -> float:
            assert end.passed
            return 1.0

    event = Event()
    laps[0].events.append((event, event))
    for lap in laps:
        watch.hand_in(lap)
    assert reported == []
    event.passed = True
    watch.hand_in(watch.lap("third", torch.device("cpu")))
    assert reported == ["first", "second", "third"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_stopwatch_on_cuda() -> None:
    reported: list[float] = []
    watch = Stopwatch(lambda label, seconds: reported.append(seconds))
    lap = watch.lap("tome", torch.device("cuda"))
    with lap.running():
        torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
    start = time.perf_counter()
    watch.hand_in(lap)
    assert time.perf_counter() - start < 0.02
    assert reported == []
    torch.cuda.synchronize()
    watch.hand_in(watch.lap("tome", torch.device("cuda")))
    assert reported[0] == pytest.approx(0.1, rel=0.6)


def test_the_switch_alone_chooses_no_method() -> None:
    assert FicocoConfig.parse({"metrics": False}).method is None
    assert FicocoConfig.parse({"metrics": False, "keep": 64}).method == DEFAULT_METHOD
    with pytest.raises(ValueError, match=r"ficoco.metrics = 'no'"):
        FicocoConfig.parse({"metrics": "no"})


def test_the_switch_changes_no_cache_entry() -> None:
    on, off = (
        ServerPlan.for_model(FicocoConfig.parse({"keep": 64, "metrics": value}), LLAVA).tower.fingerprint
        for value in (True, False)
    )
    assert on == off


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], False),
        (["--ficoco-method", "ficoco-v"], True),
        (["--ficoco-keep", "9"], True),
        (["--ficoco-method", "ficoco-v", "--ficoco-no-metrics"], False),
        (["--ficoco-config", '{"method": "tome", "metrics": false}'], False),
        (["--additional-config", '{"ficoco": {"method": "tome"}}'], True),
        (["--additional-config", '{"ficoco": {"method": "tome"}}', "--ficoco-no-metrics"], False),
        (["--additional-config", '{"other": 1}'], False),
    ],
)
def test_when_processes_share_metrics(arguments: list[str], expected: bool) -> None:
    config = FicocoConfig.parse(resolve_settings(read_options(arguments))[0])
    assert (config.method is not None and config.metrics) is expected


def test_the_shared_folder_is_fresh_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv(MULTIPROC, raising=False)
    with shared_metrics(True) as folder:
        assert folder == os.environ[MULTIPROC]
        assert folder is not None
        assert list(Path(folder).iterdir()) == []
    assert not Path(folder).exists()
    monkeypatch.setenv(MULTIPROC, "/somewhere")
    with shared_metrics(True) as folder:
        assert folder is None
        assert os.environ[MULTIPROC] == "/somewhere"
