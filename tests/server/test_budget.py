"""The default budget that follows the load, for methods of the tower, of the decoder, and of both."""

import asyncio
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.kv.admission import ChatBudgets, fill_budget
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.quality.settings import QualitySettings
from ficoco_vllm.server.budget import (
    DecoderBudget,
    DefaultBudget,
    TowerBudget,
    check_budgets,
    most_tokens,
    on_server,
)
from ficoco_vllm.server.elastic.budget import ElasticBudget
from ficoco_vllm.server.elastic.settings import OPTION, ElasticSettings
from ficoco_vllm.server.load.recorder import LoadRecorder
from ficoco_vllm.server.moving_budget import install

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
    config = FicocoConfig.parse(ficoco)
    settings.check_bounds(min_keep, most_tokens(config, HF_CONFIG))
    check_budgets(OPTION, settings.budgets, config, HF_CONFIG)


def test_the_default_ladder_leaves_out_what_a_method_cannot_reach() -> None:
    """ToMe halves at most; four reducing layers bring 576 tokens to 36. A ladder of the operator's is refused."""
    vision = CLIPVisionConfig(image_size=336, patch_size=14, num_hidden_layers=8)
    shallow = LlavaConfig(
        vision_config=vision,
        text_config=HF_CONFIG.text_config,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    settings, tome = QualitySettings(target_agreement=0.9), FicocoConfig.parse({"method": "tome"})
    every = (32, 64, 96, 128, 192, 288, 576)
    reached = on_server(settings, tome, shallow).ladder or ()
    assert 1 < len(reached) < len(every)
    assert reached == every[-len(reached) :]
    assert on_server(settings, FicocoConfig.parse({"method": "random"}), shallow).ladder == every
    named = settings.model_copy(update={"ladder": every})
    with pytest.raises(ValueError, match=r"quality\.ladder: the budget 32 of 32, 64, .* cannot be served"):
        on_server(named, tome, shallow)
    with pytest.raises(ValueError, match=r"kv_budget = 64\.0 is not allowed with --ficoco-target-agreement"):
        on_server(settings, FicocoConfig.parse({"method": "ficoco-l", "kv_budget": 64}), HF_CONFIG)


class Level:
    """A source at a level of our choice."""

    def __init__(self, budgets: tuple[int, ...], level: int) -> None:
        self.budgets, self.level = budgets, level

    def __call__(self) -> int:
        """The budget of the level."""
        return self.budgets[self.level]

    def update(self) -> None:
        """Stay."""


class Failing(Level):
    """A source whose file cannot be written at first."""

    def __init__(self, budgets: tuple[int, ...], num_failures: int) -> None:
        super().__init__(budgets, len(budgets) - 1)
        self.num_failures = num_failures

    def update(self) -> None:
        """Fail, or go to the lowest level."""
        self.num_failures -= 1
        if self.num_failures >= 0:
            raise OSError("no space left")
        self.level = 0


def test_a_file_that_cannot_be_written_leaves_the_budget_and_is_told_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[int] = []
    told: list[str] = []
    monkeypatch.setattr("ficoco_vllm.server.budget.UPDATE_SECONDS", 0.0)
    monkeypatch.setattr(
        "ficoco_vllm.server.budget.logger.warning", lambda text, *more: told.append(text % more)
    )

    async def run() -> None:
        following = asyncio.create_task(DefaultBudget((Failing((64, 288), 3),)).follow(shown.append))
        while 64 not in shown:
            await asyncio.sleep(0)
        following.cancel()

    asyncio.run(run())
    assert shown[:4] == [288, 288, 288, 64]
    assert told == ["ficoco: the default budget stays at 288 visual tokens: no space left"]


def fixed(level: int, settings: ElasticSettings = SETTINGS) -> DefaultBudget:
    """A budget at a level of our choice."""
    return DefaultBudget((Level(settings.budgets, level),))


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
    assert TowerBudget(fixed(level), served)(None) == budget
    assert TowerBudget(fixed(level), served)("visionzip") == budget


def test_a_method_that_cannot_reach_the_level_gets_the_next_one_that_it_can() -> None:
    settings = ElasticSettings(floor=1, ceiling=512, levels=10)
    served = server_plan(method="tome", keep=300, start_layer=22)
    reached = [TowerBudget(fixed(level, settings), served)("tome") for level in range(10)]
    assert reached == [512] * 10
    assert TowerBudget(fixed(3, settings), served)("topk-cls") == 8
    # An unknown method reaches no budget; it is refused by name, as without elastic.
    assert TowerBudget(fixed(0, settings), served)("magic") == 1


def test_the_decoder_gets_the_level_but_no_more_than_enters() -> None:
    served = server_plan(method="ficoco-l")
    assert not served.tower_follows
    assert DecoderBudget(fixed(2), served)(None, 576) == 136
    assert DecoderBudget(fixed(2), served)("fastv", 576) == 136
    assert DecoderBudget(fixed(4), served)(None, 100) == 100


def test_of_a_method_that_reduces_twice_both_parts_follow_together() -> None:
    served = server_plan(method="ficoco-vl", keep=64)
    tower, decoder = TowerBudget(fixed(4), served), DecoderBudget(fixed(0), served)
    entering = tower(None)
    assert entering == 407  # the geometric mean of 576 and 288
    # The load has changed since the prompt was sized; the tower's budget says for which level it was.
    assert decoder(None, entering) == 288
    assert decoder(None, 200) == 64
    still = server_plan(method="ficoco-vl", encoder={"keep": 192})
    assert not still.tower_follows
    assert DecoderBudget(fixed(4), still)(None, 192) == 192


def request(extra_args: dict[str, Any] | None, *lengths: int) -> Any:
    """The attributes of vLLM's request that admission reads."""
    features = [SimpleNamespace(mm_position=SimpleNamespace(offset=0, length=length)) for length in lengths]
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra_args), mm_features=features)


def test_an_explicit_budget_in_the_decoder_wins_and_others_are_filled() -> None:
    budget = DecoderBudget(fixed(1), server_plan(method="ficoco-l"))
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


def test_the_largest_of_two_sources_counts() -> None:
    load, quality = Level((64, 93, 288), 0), Level((32, 128, 576), 1)
    budget = DefaultBudget((load, quality))
    assert budget.budgets == (32, 64, 93, 128, 288, 576)
    assert budget() == 128, "the quality's rung is the floor"
    load.level = 2
    assert budget() == 288

    def odd(keep: int) -> None:
        if keep < 300:
            raise ValueError(keep)

    assert budget.reachable(odd) == 576


def test_it_is_updated_and_shown_while_the_server_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    source, shown = Level((64, 288), 0), list[int]()
    counts = iter(range(3))

    def update() -> None:
        source.level = next(counts) % 2

    monkeypatch.setattr(source, "update", update)

    async def run() -> None:
        task = asyncio.create_task(DefaultBudget((source,)).follow(shown.append))
        while len(shown) < 3:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(asyncio.wait_for(run(), 10))
    assert shown == [64, 288, 64]


def test_statistics_of_vllm_move_the_budget(tmp_path: Path) -> None:
    manager = SimpleNamespace(stat_loggers=[])
    recorder = LoadRecorder.on(SimpleNamespace(logger_manager=manager), OPTION)
    assert manager.stat_loggers == [recorder]
    settings = ElasticSettings(
        floor=64, ceiling=288, levels=2, attack_seconds=0.01, release_seconds=0.02, max_release_seconds=0.1
    )
    budget = ElasticBudget(settings, tmp_path, recorder, lambda: 9)
    assert budget() == 288
    preempted = IterationStats()
    preempted.num_preempted_reqs = 3
    deadline = time.monotonic() + 5
    while budget() > 64 and time.monotonic() < deadline:
        recorder.record(SchedulerStats(kv_cache_usage=1.0, num_running_reqs=2, num_waiting_reqs=7), preempted)
        budget.update()
    assert budget() == 64
    recorder.record(None, None)  # the statistics of this step went to another process
    recorder.log_engine_initialized()


@pytest.mark.parametrize(
    "options", [{}, {"ficoco_elastic": None, "ficoco_quality": None}], ids=["none", "ours"]
)
def test_without_an_option_nothing_is_installed(options: dict[str, Any]) -> None:
    """Neither on plain `vllm serve`, which has none of our options, nor on ours with both off."""

    def generate() -> None:
        """The engine's."""

    def create_chat_completion() -> None:
        """The handler's."""

    engine = SimpleNamespace(generate=generate)
    chat = SimpleNamespace(create_chat_completion=create_chat_completion)
    applier: Any = SimpleNamespace(default_tower=None)
    state = SimpleNamespace(openai_serving_chat=chat)
    assert install(engine, state, Namespace(**options), applier) is None
    assert vars(engine) == {"generate": generate}
    assert vars(chat) == {"create_chat_completion": create_chat_completion}
    assert applier.default_tower is None


def test_without_statistics_it_is_refused() -> None:
    with pytest.raises(ValueError, match="--disable-log-stats is not allowed"):
        LoadRecorder.on(SimpleNamespace(logger_manager=None), OPTION)
