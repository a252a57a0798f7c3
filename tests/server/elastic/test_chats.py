"""Budgets that follow the load, as the server's renderer hands them out: later turns of a chat keep the first one's."""

from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig

from ficoco_vllm import demo_model
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.hooks.admission import FrontEnd
from ficoco_vllm.metrics.savings import Accountant
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.server.request_field.apply import FieldApplier
from ficoco_vllm.server.request_field.resolve import UNBOUNDED, Resolver

IMAGE = (5, 576)
MARKER = [7, 8]


def applier() -> FieldApplier:
    """Reads the requests of a server whose budget is another one at each look."""
    hf_config = AutoConfig.from_pretrained(demo_model.path())
    config = FicocoConfig.parse({"method": "ficoco-l", "keep": 64, "windows": "turn"})
    hf_config.ficoco = config.model_dump(mode="json")
    plan, load = ServerPlan.of(config, hf_config), iter(range(90, 0, -1))
    processor = SimpleNamespace(
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config)),
        renderer=SimpleNamespace(ficoco_generation_prompt=MARKER),
        ficoco=FrontEnd(counter=None, default_keep=lambda method, most: next(load)),
    )
    return FieldApplier(Resolver(plan, UNBOUNDED), Accountant(plan, None), 0, processor)


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
        account = reading._account(request, rendered)
        assert account is not None
        assert request.vllm_xargs == {"ficoco_keep": account.budgets[0]}
        return account.budgets[0]

    assert keep(prompt(620, 600)) == 90
    assert keep(prompt(680, 600)) == 90, "the second turn, whose first window is the same"
    assert keep(prompt(620, 610)) == 89, "another question"
    assert keep(prompt(620, 600, "another image")) == 88
