"""Budgets that follow the load, as the server's renderer hands them out: later turns of a chat keep the first one's."""

from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig

from ficoco_vllm import demo_model
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.hooks.admission import FrontEnd
from ficoco_vllm.metrics.savings import SavingsPlanner
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.server.request_field.apply import FieldApplier
from ficoco_vllm.server.request_field.resolve import UNBOUNDED, Resolver

IMAGE = (5, 576)
MARKER = [7, 8]


def applier(method: str = "ficoco-l", windows: str = "turn") -> FieldApplier:
    """Reads the requests of a server whose budget is another one at each look."""
    hf_config = AutoConfig.from_pretrained(demo_model.path())
    config = FicocoConfig.parse({"method": method, "keep": 64, "windows": windows})
    hf_config.ficoco = config.model_dump(mode="json")
    plan, load = ServerPlan.of(config, hf_config), iter(range(90, 0, -1))
    processor = SimpleNamespace(
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config)),
        renderer=SimpleNamespace(ficoco_generation_prompt=MARKER),
        ficoco=FrontEnd(counter=None, default_keep=lambda method, most: next(load)),
    )
    reading = FieldApplier(Resolver(plan, UNBOUNDED), SavingsPlanner(plan, None), 0, processor)
    tower = iter(range(300, 0, -1))
    reading.default_tower = lambda method: next(tower)
    return reading


def prompt(num_tokens: int, marker_at: int, name: str = "image") -> dict[str, Any]:
    """A rendered chat whose first turn ends with the generation prompt."""
    tokens = [0] * num_tokens
    tokens[marker_at : marker_at + 2] = MARKER
    offset, length = IMAGE
    place = SimpleNamespace(offset=offset, length=length)
    places, hashes = {"image": [place]}, {"image": [name]}
    return {"prompt_token_ids": tokens, "mm_placeholders": places, "mm_hashes": hashes}


def test_a_chat_keeps_the_budget_of_its_first_turn() -> None:
    reading = applier()

    def keep(rendered: dict[str, Any]) -> int:
        request = SimpleNamespace(vllm_xargs=None)
        savings = reading._savings_of(request, rendered)
        assert savings is not None
        assert request.vllm_xargs == {"ficoco_keep": savings.budgets[0]}
        return savings.budgets[0]

    assert keep(prompt(620, 600)) == 90
    assert keep(prompt(680, 600)) == 90, "the second turn, whose first window is the same"
    assert keep(prompt(620, 610)) == 89, "another question"
    assert keep(prompt(620, 600, "another image")) == 88


def message(role: str, text: str, image: str | None = None) -> dict[str, Any]:
    """One of a chat."""
    if image is None:
        return {"role": role, "content": text}
    picture = {"type": "image_url", "image_url": {"url": image}}
    return {"role": role, "content": [{"type": "text", "text": text}, picture]}


def test_a_chat_keeps_the_tower_s_budget_where_both_reduce() -> None:
    """Its placeholders are part of the cached window."""
    reading = applier("ficoco-vl")

    def keep(*messages: dict[str, Any]) -> int:
        request = SimpleNamespace(mm_processor_kwargs=None, vllm_xargs=None, media_io_kwargs=None)
        assert reading._apply(request, messages)
        return int(request.mm_processor_kwargs["ficoco_keep"])

    system, asked = message("system", "be brief"), message("user", "what is it?", "a")
    later = [message("assistant", "a cat"), message("user", "and this?", "b")]
    assert keep(system, asked) == 300
    assert keep(system, asked, *later) == 300
    assert keep(system, asked, *later, message("assistant", "a dog"), message("user", "sure?")) == 300
    assert keep(system, message("user", "what is it?", "b")) == 299, "another image"
    assert keep(message("system", "be long"), asked) == 298, "another chat"
    assert keep(system, asked, message("user", "quick!")) == 297, "a turn of two messages"
    assert keep(system, asked) == 300
    assert keep(message("user", "hello")) == 296, "nothing to keep without an image"
    assert keep(message("user", "hello")) == 295


def test_the_tower_s_budget_follows_the_load_where_no_window_is_cached() -> None:
    for method, windows in (("ficoco-v", "off"), ("ficoco-vl", "prompt")):
        reading = applier(method, windows)
        asked = [message("user", "what is it?", "a")]
        for expected in (300, 299):
            request = SimpleNamespace(mm_processor_kwargs=None, vllm_xargs=None, media_io_kwargs=None)
            reading._apply(request, asked)
            assert request.mm_processor_kwargs == {"ficoco_keep": expected}
