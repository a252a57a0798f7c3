"""Chats of the benchmarks, and the promises that their committed results keep."""

from typing import Any

import pytest

from ficoco_vllm.benchmarks.chat.__main__ import bars, summarise
from ficoco_vllm.benchmarks.chat.accuracy import compare, messages
from ficoco_vllm.benchmarks.chat.questions import KINDS, held_out_chats
from ficoco_vllm.benchmarks.harness.results import read


@pytest.mark.parametrize("kind", KINDS)
def test_chats_ask_about_different_things(kind: str) -> None:
    chats = held_out_chats(kind, 24)
    assert {len(chat.turns) for chat in chats} <= {2, 3, 4}
    for chat, again in zip(chats, held_out_chats(kind, 24), strict=True):
        assert chat.turns == again.turns
        assert (chat.scene.image == again.scene.image).all()
        assert len({turn.text for turn in chat.turns}) == len(chat.turns)
        assert chat.turns[-1].kind == kind
        body = messages(chat)
        assert [one["role"] for one in body] == ["user", "assistant"] * (len(chat.turns) - 1) + ["user"]
        assert body[-1]["content"] == chat.turns[-1].text
    answers = [chat.turns[-1].answer for chat in chats]
    assert max(map(answers.count, answers)) <= len(chats) / 2


def test_differences_are_paired() -> None:
    full, whole, window = (
        {"count": list(map(bool, row))} for row in ([1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0])
    )
    result = compare(full, whole, window)
    assert [result["accuracy"][name][0] for name in ("full", "whole", "window")] == [100, 50, 50]
    assert result["window_against_whole"][0] == 0
    assert result["window_against_whole"][1] < 0 < result["window_against_whole"][2]


def test_the_default_follows_from_the_committed_run() -> None:
    """Windows end with a turn where no loss is found; `test_refusals.py` has the defaults."""
    rows: list[dict[str, Any]] = read("chat-accuracy")["rows"]
    losing = {row["method"] for row in rows if row["window_against_whole"][2] < 0}
    assert losing == {"sparsevlm"}
    of_decoder = {"ficoco-l", "fastv", "pyramiddrop", "fitprune"}
    assert {row["method"] for row in rows} - losing == of_decoder | {"ficoco-vl", "vscan", "tops"}


def test_the_committed_chats_pass() -> None:
    assert all(bar.passed for bar in bars(read("chat")))


def chat(beyond: list[int], cached: float) -> list[dict[str, float]]:
    """Rounds of a chat, as the worker measures them."""
    return [{"ttft_seconds": 1.0, "cached_share": cached, "num_beyond_plan": more} for more in beyond]


def chat_result(ours: list[dict[str, float]], stock: list[dict[str, float]]) -> dict[str, Any]:
    system = [{"ttft_seconds": 1.0, "cached_tokens": 480.0}]
    prompts = {name: summarise(system, system) for name in ("stock", "ficoco-l")}
    chats = {"stock": summarise(stock, stock), "ficoco-l": summarise(ours, stock)}
    return {"layers": 8, "kinds": {"chat": chats, "system prompt": prompts}}


def test_blocks_beyond_the_plan_are_those_of_one_round() -> None:
    """A round with a small plan is not excused by another one's large plan."""
    stock = chat([0, 0], 0.9)
    assert all(bar.passed for bar in bars(chat_result(chat([8, 1], 0.9), stock)))
    failed = {bar.name for bar in bars(chat_result(chat([20, 0], 0.9), stock)) if not bar.passed}
    assert failed == {"chat-kv-blocks-beyond-plan"}


def test_a_stock_cache_that_finds_nothing_fails() -> None:
    stock = chat([0, 0], 0.0)
    failed = {bar.name for bar in bars(chat_result(chat([0, 0], 0.0), stock)) if not bar.passed}
    assert failed == {"chat-stock-cached-share"}


def test_a_first_token_that_comes_later_than_stock_s_fails() -> None:
    stock = chat([0, 0], 0.9)
    slow = [{**sample, "ttft_seconds": 1.2} for sample in stock]
    failed = {bar.name for bar in bars(chat_result(slow, stock)) if not bar.passed}
    assert failed == {"chat-chat-ttft-over-stock"}
