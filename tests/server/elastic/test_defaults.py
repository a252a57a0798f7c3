"""The default budget that follows the load, for methods of the tower, of the decoder, and of both."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.kv.admission import ChatBudgets, fill_budget
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.server.elastic.budget import ElasticBudget, LoadRecorder, install
from ficoco_vllm.server.elastic.defaults import DecoderBudget, TowerBudget, check_elastic
from ficoco_vllm.server.elastic.settings import ElasticSettings

# 576 patches, towers and decoders of LLaVA-1.5's depth.
HF_CONFIG = LlavaConfig(
    vision_config=CLIPVisionConfig(image_size=336, patch_size=14, num_hidden_layers=24),
    text_config=LlamaConfig(num_hidden_layers=32),
    vision_feature_layer=-2,
    vision_feature_select_strategy="default",
)
SETTINGS = ElasticSettings(floor=64, ceiling=288)


def server_plan(**ficoco: Any) -> ServerPlan:
    """The plan of a server of LLaVA-1.5's shape."""
    return ServerPlan.of(FicocoConfig.parse(ficoco), HF_CONFIG)


def check(settings: ElasticSettings, min_keep: int = 1, **ficoco: Any) -> None:
    """As at start-up."""
    check_elastic(settings, FicocoConfig.parse(ficoco), HF_CONFIG, min_keep)


class Fixed(ElasticBudget):
    """A budget at a level of our choice."""

    def __init__(self, level: int, settings: ElasticSettings = SETTINGS) -> None:
        self.settings = settings
        self._level = level


@pytest.mark.parametrize(
    "ficoco",
    [
        {"method": "ficoco-v"},
        {"method": "visionzip"},
        {"method": "ficoco-l"},
        {"method": "fastv"},
        {"method": "ficoco-vl", "keep": 64},
        {"method": "ficoco-vl", "encoder": {"keep": 192}},
    ],
)
def test_levels_are_served_by_methods_of_every_site(ficoco: dict[str, Any]) -> None:
    check(SETTINGS, **ficoco)


def test_what_the_operator_and_the_model_do_not_allow() -> None:
    with pytest.raises(ValueError, match=r"floor = 64 .* at least 65 \(--ficoco-min-keep\)"):
        check(SETTINGS, min_keep=65, method="ficoco-v")
    with pytest.raises(ValueError, match=r"kv_budget = 300.0 .* allowed: keep, or neither"):
        check(SETTINGS, method="ficoco-l", kv_budget=300)
    with pytest.raises(ValueError, match=r"ceiling = 600 .* at most 576"):
        check(ElasticSettings(floor=64, ceiling=600), method="ficoco-l")
    # ToMe removes at most half of the tokens in one layer.
    check(ElasticSettings(floor=1, ceiling=288), method="tome")
    with pytest.raises(ValueError, match=r"the budget 100 of 100, .* cannot be served"):
        check(ElasticSettings(floor=100, ceiling=400), method="tome", start_layer=22)


@pytest.mark.parametrize("level", range(5))
def test_the_tower_gets_the_level(level: int) -> None:
    served = server_plan(method="ficoco-v")
    budget = SETTINGS.budgets[level]
    assert served.tower_follows
    assert TowerBudget(Fixed(level), served)(None) == budget
    assert TowerBudget(Fixed(level), served)("visionzip") == budget


def test_a_method_that_cannot_reach_the_level_gets_the_next_one_that_it_can() -> None:
    settings = ElasticSettings(floor=1, ceiling=512, levels=10)
    served = server_plan(method="tome", keep=300, start_layer=22)
    reached = [TowerBudget(Fixed(level, settings), served)("tome") for level in range(10)]
    assert reached == [512] * 10
    assert TowerBudget(Fixed(3, settings), served)("topk-cls") == 8
    # An unknown method reaches no budget; it is refused by name, as without elastic.
    assert TowerBudget(Fixed(0, settings), served)("magic") == 1


def test_the_decoder_gets_the_level_but_no_more_than_enters() -> None:
    served = server_plan(method="ficoco-l")
    assert not served.tower_follows
    assert DecoderBudget(Fixed(2), served)(None, 576) == 136
    assert DecoderBudget(Fixed(2), served)("fastv", 576) == 136
    assert DecoderBudget(Fixed(4), served)(None, 100) == 100


def test_of_a_method_that_reduces_twice_both_parts_follow_together() -> None:
    served = server_plan(method="ficoco-vl", keep=64)
    tower, decoder = TowerBudget(Fixed(4), served), DecoderBudget(Fixed(0), served)
    entering = tower(None)
    assert entering == 407  # the geometric mean of 576 and 288
    # The load has changed since the prompt was sized; the tower's budget says for which level it was.
    assert decoder(None, entering) == 288
    assert decoder(None, 200) == 64
    fixed = server_plan(method="ficoco-vl", encoder={"keep": 192})
    assert not fixed.tower_follows
    assert DecoderBudget(Fixed(4), fixed)(None, 192) == 192


def request(extra_args: dict[str, Any] | None, *lengths: int) -> Any:
    """The attributes of vLLM's request that admission reads."""
    features = [SimpleNamespace(mm_position=SimpleNamespace(offset=0, length=length)) for length in lengths]
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra_args), mm_features=features)


def test_an_explicit_budget_in_the_decoder_wins_and_others_are_filled() -> None:
    budget = DecoderBudget(Fixed(1), server_plan(method="ficoco-l"))
    for extra_args, lengths, expected in (
        ({"ficoco_keep": 500}, (576,), {"ficoco_keep": 500}),
        ({"ficoco_method": "fastv"}, (576,), {"ficoco_method": "fastv", "ficoco_keep": 93}),
        (None, (576, 576), {"ficoco_keep": 93}),
        (None, (), None),
    ):
        requested = request(extra_args, *lengths)
        fill_budget(budget, ChatBudgets(), requested)
        assert requested.sampling_params.extra_args == expected
    fill_budget(budget, ChatBudgets(), SimpleNamespace(sampling_params=None, mm_features=[1]))


def test_statistics_of_vllm_move_the_budget(tmp_path: Path) -> None:
    shown: list[int] = []
    manager = SimpleNamespace(stat_loggers=[])
    client = SimpleNamespace(logger_manager=manager, get_num_unfinished_requests=lambda: 9)
    settings = ElasticSettings(
        floor=64, ceiling=288, levels=2, attack_seconds=0.01, release_seconds=0.02, max_release_seconds=0.1
    )

    async def start() -> ElasticBudget:
        budget, _ = install(settings, tmp_path, client, shown.append)
        return budget

    budget = asyncio.run(start())  # its task ends with the loop; here the test looks at the board itself
    (recorder,) = manager.stat_loggers
    assert isinstance(recorder, LoadRecorder)
    assert budget() == 288
    preempted = IterationStats()
    preempted.num_preempted_reqs = 3
    deadline = time.monotonic() + 5
    while budget() > 64 and time.monotonic() < deadline:
        recorder.record(SchedulerStats(kv_cache_usage=1.0, num_running_reqs=2, num_waiting_reqs=7), preempted)
        budget.update()
    assert budget() == 64
    assert shown[0] == 288
    assert shown[-1] == 64
    recorder.record(None, None)  # the statistics of this step went to another process
    recorder.log_engine_initialized()


def test_without_statistics_it_is_refused(tmp_path: Path) -> None:
    async def start() -> None:
        install(SETTINGS, tmp_path, SimpleNamespace(logger_manager=None), print)

    with pytest.raises(ValueError, match="--disable-log-stats is not allowed"):
        asyncio.run(start())
