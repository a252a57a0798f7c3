"""Choosing and comparing requests, with an engine and handlers of our own."""

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import BaseModel, ConfigDict, Field
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from vllm.sampling_params import SamplingParams

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.planning.tower import Budget
from ficoco_vllm.quality.settings import QualitySettings
from ficoco_vllm.request_fields import BUDGET, KEEP
from ficoco_vllm.server.load.recorder import LoadRecorder
from ficoco_vllm.server.load.reports import EngineReport, Load
from ficoco_vllm.server.quality import comparing
from ficoco_vllm.server.quality.budget import MAX_CLASSES, OTHER, UNNAMED, QualityBudget, traffic
from ficoco_vllm.server.quality.comparing import LOWEST_PRIORITY, Comparer
from ficoco_vllm.server.quality.served import ServedBudget

NUM_TOKENS = 576
# 576 patches, tower and decoder of LLaVA-1.5's depth.
HF_CONFIG = LlavaConfig(
    vision_config=CLIPVisionConfig(image_size=336, patch_size=14, num_hidden_layers=24),
    text_config=LlamaConfig(num_hidden_layers=32),
    vision_feature_layer=-2,
    vision_feature_select_strategy="default",
)
Answering = Callable[[Any], str]


class Request(BaseModel):
    """The fields of vLLM's requests that are read."""

    model_config = ConfigDict(extra="allow")

    prompt: str = "?"
    stream: bool = False
    temperature: float = 0.0
    n: int = 1
    request_id: str = Field(default_factory=lambda: "fresh")
    metadata: dict[str, str] | None = None


class Engine:
    """Answers by a function of the request's budget.

    Attributes:
        sent: budget, parameters and priority of each prompt.
        errored: as vLLM's, whether the engine is gone.
        starves: whether second answers never have their turn.
    """

    errored = False
    starves = False

    def __init__(self, answering: Callable[[int, SamplingParams], str]) -> None:
        self.answering = answering
        self.sent: list[tuple[int, SamplingParams, int]] = []

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, priority: int = 0
    ) -> AsyncIterator[Any]:
        """As vLLM's."""
        return self._generate(prompt, sampling_params, priority)

    async def _generate(self, prompt: Any, params: Any, priority: int) -> AsyncIterator[Any]:
        if self.starves and priority == LOWEST_PRIORITY:
            await asyncio.sleep(3600)
        keep = (params.extra_args or {}).get(KEEP, prompt[BUDGET].keep)
        self.sent.append((keep, params, priority))
        text = self.answering(keep, params)
        ids = [ord(letter) for letter in text]
        logprobs = None if params.logprobs is None else [{i: SimpleNamespace(logprob=-0.5)} for i in ids]
        forced = None
        if params.prompt_logprobs is not None:
            forced = [{i: SimpleNamespace(logprob=-1.5)} for i in prompt["prompt_token_ids"]]
        answer = SimpleNamespace(text=text, token_ids=ids, logprobs=logprobs, finish_reason="stop")
        yield SimpleNamespace(
            prompt_token_ids=prompt["prompt_token_ids"], prompt_logprobs=forced, outputs=[answer]
        )


class Figures:
    """Notes what is reported."""

    def __init__(self) -> None:
        self.scores: list[tuple[int, str, float]] = []
        self.skipped: list[str] = []
        self.tokens = 0

    def score(self, keep: int, name: str, score: float) -> None:
        """As in the metrics."""
        self.scores.append((keep, name, score))

    def spend(self, num_tokens: int) -> None:
        """As in the metrics."""
        self.tokens += num_tokens

    def skip(self, reason: str) -> None:
        """As in the metrics."""
        self.skipped.append(reason)


class Server:
    """A server with a handler that renders and generates, as vLLM's do.

    Attributes:
        least: visual tokens of an image that requests without a budget keep at least, as where the load asks for them.
        chat: budget that a chat has from its first turn.
        plan: of the server.
    """

    least = 0
    chat: int | None = None

    def __init__(
        self, folder: Path, engine: Engine, ficoco: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        values = {"target_agreement": 0.8, "ladder": [64, NUM_TOKENS], "share": 1.0, "max_extra": 1.0}
        parsed = QualitySettings.parse({**values, "max_tokens_per_minute": 10**9, **settings})
        self.budget = QualityBudget(parsed, "ficoco-v", folder, LoadRecorder(), lambda: 1)
        self.figures, self.engine = Figures(), engine
        self.plan = ServerPlan.of(FicocoConfig.parse(ficoco or {"method": "ficoco-v"}), HF_CONFIG)
        self.comparer = Comparer(self.budget, self.plan, cast(Any, self.figures), has_priorities=True)
        self.comparer._allowance.is_ready, self.comparer._allowance.earned = True, 1e6
        self.openai_serving_chat = self
        self.comparer.attach(self, engine)

    async def create_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
        """The handler."""
        field = (request.model_extra or {}).get("ficoco")
        keep = NUM_TOKENS if field == "off" else self.given() if field is None else field["keep"]
        params = SamplingParams(temperature=request.temperature, n=request.n)
        entering = in_tower = NUM_TOKENS
        if self.plan.tower.active:
            in_tower = NUM_TOKENS if field == "off" else self.plan.tower_keep(keep)
            entering = in_tower
        if self.plan.decoder is not None:
            params.extra_args = {KEEP: min(keep, entering)}
        place = SimpleNamespace(offset=0, length=entering)
        prompt = {
            BUDGET: Budget(None, in_tower),
            "prompt_token_ids": [0] * entering,
            "mm_placeholders": {"image": [place]},
        }
        text = ""
        async for output in self.engine.generate(prompt, params, "id"):
            text = output.outputs[0].text
        return text

    def given(self) -> int:
        """Budget of a request that names none."""
        return max(self.least, self.budget()) if self.chat is None else self.chat

    async def ask(self, raw_request: Any = None, **fields: Any) -> str:
        """Send one request, and wait for its comparison."""
        answer: str = await self.create_chat_completion(Request(**fields), raw_request)
        while self.comparer._waiting:
            await asyncio.sleep(0.001)
        self.budget.update()
        return answer


def test_both_answers_are_compared_after_the_first_was_given(tmp_path: Path) -> None:
    engine = Engine(lambda keep, params: "706" if keep == NUM_TOKENS else "708")
    server = Server(tmp_path, engine)
    assert asyncio.run(server.ask()) == "706"
    assert [(keep, priority) for keep, _, priority in engine.sent] == [(576, 0), (64, LOWEST_PRIORITY)]
    assert server.figures.scores == [(64, "", 0.0)]
    assert server.figures.tokens == 64 + 3
    assert server.budget.state(UNNAMED).rungs[0].tally.count == 1


def test_at_a_reduced_budget_the_full_model_answers_once_for_all_rungs(tmp_path: Path) -> None:
    engine = Engine(lambda keep, params: "same")
    server = Server(tmp_path, engine, ladder=[32, 64, NUM_TOKENS])

    async def run() -> None:
        while server.budget() > 64:
            await server.ask()
        engine.sent.clear()
        await server.ask()

    asyncio.run(run())
    if server.budget() == 64:
        assert [keep for keep, *_ in engine.sent] == [64, NUM_TOKENS, 32]
    else:  # the smallest was shown first
        assert [keep for keep, *_ in engine.sent] == [32, NUM_TOKENS]


@pytest.mark.parametrize("method", ["ficoco-v", "ficoco-l", "ficoco-vl"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_request_that_got_more_tokens_than_its_rung_is_no_score_of_that_rung(
    method: str, temperature: float, tmp_path: Path
) -> None:
    """With `--ficoco-elastic` the client gets the larger of two budgets; the rung is then asked for, too."""
    wrong, right = "wrong", "right"
    engine = Engine(lambda keep, params: right if keep >= 288 else wrong)
    server = Server(tmp_path, engine, {"method": method}, ladder=[64, 288, NUM_TOKENS])
    server.budget.states = {UNNAMED: replace(server.budget.state(UNNAMED), served=0)}
    server.least = 288
    assert asyncio.run(server.ask(temperature=temperature)) == right
    kept = [keep for keep, params, _ in engine.sent if params.prompt_logprobs is None]
    if temperature:
        assert kept == [288, 64]
        (forced,) = (keep for keep, params, _ in engine.sent if params.prompt_logprobs is not None)
        assert forced == NUM_TOKENS
        ((rung, name, score),) = server.figures.scores
        assert (rung, name) == (64, "")
        assert score == pytest.approx(math.exp(-1))
    else:
        assert kept == [288, 64, NUM_TOKENS]
        assert server.figures.scores == [(64, "", 0.0)]


def test_an_answer_with_all_tokens_is_the_full_model_s_whatever_the_rung(tmp_path: Path) -> None:
    engine = Engine(lambda keep, params: "right" if keep == NUM_TOKENS else "wrong")
    server = Server(tmp_path, engine)
    server.budget.states = {UNNAMED: replace(server.budget.state(UNNAMED), served=0)}
    server.least = NUM_TOKENS
    asyncio.run(server.ask())
    assert [keep for keep, *_ in engine.sent] == [NUM_TOKENS, 64]
    assert server.figures.scores == [(64, "", 0.0)]


@pytest.mark.parametrize("method", ["ficoco-v", "ficoco-l", "ficoco-vl"])
def test_a_chat_that_keeps_an_earlier_budget_is_no_full_answer(method: str, tmp_path: Path) -> None:
    """Its class has gone back to all tokens since; its second turn still has few."""
    engine = Engine(lambda keep, params: "right" if keep == NUM_TOKENS else "wrong")
    server = Server(tmp_path, engine, {"method": method})
    server.chat = 64
    asyncio.run(server.ask())
    assert server.figures.scores == [(64, "", 0.0)]


@pytest.mark.parametrize(
    ("method", "entering"), [("ficoco-v", 0), ("ficoco-l", NUM_TOKENS), ("ficoco-vl", NUM_TOKENS)]
)
def test_a_budget_that_is_not_known_is_neither_a_rung_s_nor_the_full_model_s(
    method: str, entering: int
) -> None:
    """Image embeddings have seen no tower; a route that fills in no budget of the decoder leaves that to admission."""
    plan = ServerPlan.of(FicocoConfig.parse({"method": method}), HF_CONFIG)
    prompt: dict[str, Any] = {"mm_placeholders": {"image": [SimpleNamespace(offset=0, length=NUM_TOKENS)]}}
    if entering:
        prompt[BUDGET] = Budget(None, entering)
    served = ServedBudget.of(prompt, {})
    assert not served.keeps_all(plan)
    assert not any(served.is_of(plan, keep) for keep in (64, NUM_TOKENS))


def test_a_tower_with_a_budget_of_its_own_is_no_full_model(tmp_path: Path) -> None:
    ficoco = {"method": "ficoco-vl", "encoder": {"keep": 192}}
    engine = Engine(lambda keep, params: "same")
    server = Server(tmp_path, engine, ficoco)
    asyncio.run(server.ask())
    assert [keep for keep, *_ in engine.sent] == [192, NUM_TOKENS, 64]
    assert server.figures.scores == [(NUM_TOKENS, "", 1.0), (64, "", 1.0)]


def test_of_a_sampled_answer_the_full_model_reads_the_tokens(tmp_path: Path) -> None:
    engine = Engine(lambda keep, params: "abc" if params.max_tokens != 1 else "x")
    server = Server(tmp_path, engine)
    asyncio.run(server.ask(temperature=0.7))
    (first, one, _), (second, two, _), (third, three, _) = engine.sent
    assert (first, second, third) == (NUM_TOKENS, 64, NUM_TOKENS)
    assert (one.logprobs, two.logprobs, three.prompt_logprobs, three.max_tokens) == (0, 0, 0, 1)
    ((keep, traffic, score),) = server.figures.scores
    assert (keep, traffic) == (64, "")
    assert score == pytest.approx(math.exp(-1))


@pytest.mark.parametrize(
    "fields",
    [
        {"ficoco": {"keep": 100}},
        {"ficoco": "off"},
        {"mm_processor_kwargs": {"ficoco_keep": 100}},
        {"vllm_xargs": {"ficoco_method": "fastv"}},
        {"n": 2, "temperature": 0.7},
        {"echo": True},
        {"use_beam_search": True},
        {"prompt_logprobs": 1},
    ],
    ids=str,
)
def test_what_is_not_compared(fields: dict[str, Any], tmp_path: Path) -> None:
    engine = Engine(lambda keep, params: "706")
    server = Server(tmp_path, engine)
    assert asyncio.run(server.ask(**fields)) == "706"
    assert len(engine.sent) == 1
    assert server.figures.scores == []


def test_a_second_answer_that_fails_is_nobody_s_error(tmp_path: Path) -> None:
    def answering(keep: int, params: Any) -> str:
        if keep == 64:
            raise ValueError("the prompt is too long")
        return "706"

    server = Server(tmp_path, Engine(answering))
    assert asyncio.run(server.ask()) == "706"
    assert server.figures.skipped == ["failed"]
    assert server.budget.state(UNNAMED).rungs[0].tally.count == 0


def test_a_comparison_that_fails_half_way_is_counted_nowhere(tmp_path: Path) -> None:
    """The rung that has its score already is in neither the metrics nor the tally."""

    def answering(keep: int, params: Any) -> str:
        if keep == 32:
            raise ValueError("the prompt is too long")
        return "706"

    server = Server(tmp_path, Engine(answering), ladder=[32, 64, NUM_TOKENS])
    server.budget.states = {UNNAMED: replace(server.budget.state(UNNAMED), served=1)}
    asyncio.run(server.ask())
    assert [keep for keep, *_ in server.engine.sent] == [64, NUM_TOKENS, 32]
    assert server.figures.skipped == ["failed"]
    assert server.figures.scores == []
    assert server.budget.state(UNNAMED).rungs[1].tally.count == 0


def test_second_answers_that_have_no_turn_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "ANSWER_SECONDS", 0.1)
    engine = Engine(lambda keep, params: "706")
    engine.starves = True
    server = Server(tmp_path, engine)
    assert asyncio.run(server.ask()) == "706"
    assert server.figures.skipped == ["no room"]


def test_an_engine_that_ends_is_not_reported_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing.logger, "propagate", True)
    caplog.set_level(logging.WARNING, comparing.logger.name)  # other tests silence vLLM

    def answering(keep: int, params: Any) -> str:
        if keep == 64:
            raise RuntimeError("the engine is gone")
        return "706"

    engine = Engine(answering)
    server = Server(tmp_path, engine)
    asyncio.run(server.ask())
    assert "a second time: RuntimeError" in caplog.text
    assert "gone" not in caplog.text, "a text of the engine's may quote the request"
    caplog.clear()
    engine.errored = True
    asyncio.run(server.ask())
    assert server.figures.skipped == ["failed"]
    assert caplog.text == ""


def test_without_room_a_comparison_waits_and_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "WAIT_SECONDS", 0.1)
    server = Server(tmp_path, Engine(lambda keep, params: "706"))
    for load in (Load(0.9, 1, 0), Load(0.1, 2, 2)):
        server.budget._recorder.observations.reports[0] = EngineReport(time.monotonic(), load)
        server.budget.update()
        assert asyncio.run(server.ask()) == "706"
    assert server.figures.skipped == ["no room", "no room"]
    server.budget._recorder.observations.reports[0] = EngineReport(time.monotonic(), Load(0.5, 8, 2))
    server.budget.update()
    asyncio.run(server.ask())
    assert server.figures.scores == [(64, "", 1.0)]


def test_classes_of_traffic(tmp_path: Path) -> None:
    engine = Engine(lambda keep, params: "same")
    server = Server(tmp_path, engine, class_header="x-traffic")
    raw = SimpleNamespace(headers={"x-traffic": "photos"})

    async def run() -> None:
        while True:
            await server.ask(raw)
            traffic.set("photos")
            if server.budget() == 64:
                return

    asyncio.run(run())
    assert {name for _, name, _ in server.figures.scores} == {"photos"}
    assert server.budget() == NUM_TOKENS, "the unnamed class has shown nothing"
    assert server.budget.class_of("photos") == "photos"
    assert server.budget.class_of(None) == server.budget.class_of("") == UNNAMED
    assert len(server.budget.class_of("x" * 1000)) == 64
    server.budget.states = {str(number): server.budget.state("") for number in range(MAX_CLASSES)}
    assert server.budget.class_of("one more") == OTHER


def test_a_key_of_the_metadata_names_the_class(tmp_path: Path) -> None:
    server = Server(tmp_path, Engine(lambda keep, params: "same"), class_metadata="kind")
    asyncio.run(server.ask(metadata={"kind": "ocr"}))
    asyncio.run(server.ask(metadata={"other": "ocr"}))
    assert [name for _, name, _ in server.figures.scores] == ["ocr", ""]


def leaves(value: Any) -> list[Any]:
    """What a JSON value holds, but for keys."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list) else [value]


def test_of_a_request_the_file_holds_the_name_of_its_class_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    server = Server(
        tmp_path, Engine(lambda keep, params: "706"), state=str(path), class_metadata="kind", share=1.0
    )
    for kind in ("ocr", "x" * 100, None):
        metadata = None if kind is None else {"kind": kind}
        asyncio.run(server.ask(prompt="What is the number?", metadata=metadata))
    written = json.loads(path.read_text())
    assert set(written) == {"method", "target_agreement", "ladder", "states"}
    assert set(written["states"]) == {"ocr", "x" * 64, UNNAMED}
    assert all(type(leaf) in (int, float) for leaf in leaves(written["states"]))
    for text in ("706", "number"):
        assert text not in path.read_text()


def chosen(folder: Path, seed: int) -> list[int]:
    """Which of 2,000 requests are compared, of which one in ten is to be."""
    server = Server(folder, Engine(lambda keep, params: "same"), share=0.1, seed=seed)
    indices = []

    async def run() -> None:
        for number in range(2000):
            await server.create_chat_completion(Request())
            if server.comparer._waiting:
                indices.append(number)
            while server.comparer._waiting:
                await asyncio.sleep(0)

    asyncio.run(run())
    return indices


def test_the_seed_chooses_the_requests(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.mkdir()
    first, again, other = (chosen(path, seed) for path, seed in zip(paths, (0, 0, 1), strict=True))
    assert first == again
    assert first != other
    # Four standard deviations of a binomial distribution.
    for indices in (first, other):
        assert abs(len(indices) - 200) < 4 * math.sqrt(2000 * 0.1 * 0.9)


def test_processes_share_the_state_and_a_file_outlasts_them(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    first, second = (Server(tmp_path, Engine(lambda keep, params: "same"), state=str(path)) for _ in range(2))
    asyncio.run(first.ask())
    asyncio.run(second.ask())
    first.budget.update()
    assert first.budget.state(UNNAMED).rungs[0].tally.count == 2
    later = Server(tmp_path, Engine(lambda keep, params: "same"), state=str(path))
    assert later.budget.states == first.budget.states
    other = Server(tmp_path, Engine(lambda keep, params: "same"), state=str(path), target_agreement=0.9)
    assert other.budget.states == {}, "another target is begun anew"
