"""Sampling options of vLLM: each is judged, and answers equal stock's model runner V1."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

from ficoco_vllm.compat.kernels.noise import gumbel_noise
from tests.support import sampling_options as options
from tests.support.engine import PROMPT, TEXT_ONLY, Engines, request
from tests.support.remote import Remote

pytestmark = pytest.mark.compat


def test_every_field_is_judged() -> None:
    """A new option of vLLM needs values in `sampling_options`, or a place among those that choose no token."""
    other = set(options.OTHER.split())
    for route, own in ((ChatCompletionRequest, options.CHAT), (CompletionRequest, options.COMPLETION)):
        assert route.model_fields.keys() - other - own.keys() - options.SAMPLING.keys() == set(), route
    public = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert public - options.SAMPLING.keys() == options.NOT_IN_REQUESTS.keys()
    fields = {field.name for field in dataclasses.fields(StructuredOutputsParams)}
    assert {name for name in fields if not name.startswith("_")} == options.STRUCTURED.keys()


# Options whose answers do not depend on chance.
DETERMINISTIC: dict[str, dict[str, Any]] = {
    "greedy": {},
    "log-probabilities": {"logprobs": 3},
    "top-k of one": {"temperature": 1.0, "top_k": 1},
    "top-p of nearly nothing": {"temperature": 0.9, "top_p": 1e-6},
    "top-k and top-p": {"temperature": 1.0, "top_k": 1, "top_p": 0.5},
    "min-p of one": {"temperature": 1.5, "min_p": 1.0},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 2.0},
    "repetition": {"repetition_penalty": 1.8},
    "all penalties": {"presence_penalty": -1.0, "frequency_penalty": 1.5, "repetition_penalty": 0.7},
    "bias": {"logit_bias": {5: 100.0, 7: 99.9}, "logprobs": 2},
    "allowed": {"allowed_token_ids": [5, 9, 11], "logprobs": 2},
    "bad words": {"logit_bias": {40: 60.0}, "bad_words": ["a", "b c"]},
    "shortest length": {"min_tokens": 4, "logit_bias": {2: 100.0}, "ignore_eos": False},
    "stop tokens": {"stop_token_ids": [6], "logit_bias": {6: 100.0}, "min_tokens": 3},
    "named tokens": {"logprob_token_ids": [3, 4, 5]},
    "prompt": {"prompt_logprobs": 2},
    "regex": {"structured_outputs": {"regex": "[0-9]{3}"}},
    "choice": {"structured_outputs": {"choice": ["yes", "no"]}, "temperature": 1.0, "top_k": 1},
    "JSON": {"structured_outputs": {"json": options.SCHEMA}, "presence_penalty": 1.0},
    "grammar": {"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}},
}


@dataclasses.dataclass
class Result:
    """Tokens of an answer, and log-probabilities of tokens by step of the answer and of the prompt."""

    tokens: list[int]
    answer: list[dict[int, float]]
    prompt: list[dict[int, float]]


def answer(
    engine: LLM, prompt: str, images: list[Image.Image], extra: dict[str, Any] | None, together: bool
) -> list[Result]:
    """Send one request for each of the options, all together or one after the other."""
    params = [parameters(fields, extra) for fields in DETERMINISTIC.values()]
    batches = [params] if together else [[one] for one in params]
    outputs = [
        output
        for batch in batches
        for output in engine.generate([request(prompt, images)] * len(batch), batch, use_tqdm=False)
    ]
    return [
        Result(
            list(output.outputs[0].token_ids),
            steps(output.outputs[0].logprobs),
            steps(output.prompt_logprobs),
        )
        for output in outputs
    ]


def parameters(fields: dict[str, Any], extra: dict[str, Any] | None) -> SamplingParams:
    """Greedy with eight tokens where `fields` do not say otherwise."""
    made: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, "extra_args": extra, **fields}
    if "repetition_detection" in made:
        made["repetition_detection"] = RepetitionDetectionParams(**made["repetition_detection"])
    if "logit_bias" in made:
        made["logit_bias"] = {int(token): value for token, value in made["logit_bias"].items()}
    if "structured_outputs" in made:
        made["structured_outputs"] = StructuredOutputsParams(**made["structured_outputs"])
    return SamplingParams(**made)


def steps(logprobs: Any) -> list[dict[int, float]]:
    return [{token: one.logprob for token, one in step.items()} for step in logprobs or [] if step]


@pytest.mark.filterwarnings("ignore:max_rollback_tokens")  # vLLM's call of xgrammar
@pytest.mark.parametrize("with_image", [False, True])
def test_equals_stock(
    small_engine: Remote, engines: Engines, small_llava: Path, images: list[Image.Image], with_image: bool
) -> None:
    """With all visual tokens kept, the decoder's answers, all in one batch, are stock's.

    Stock gets one request at a time: in one batch with a request that names tokens (`logprob_token_ids`), model runner
    V1 reports token 0 in place of the likeliest ones of the others.
    """
    prompt, shown = (PROMPT, images[:1]) if with_image else (TEXT_ONLY, [])
    stock = answer(engines.get(small_llava, block_size=32), prompt, shown, None, False)
    ours = small_engine.call(answer, prompt, shown, {"ficoco_keep": 144} if with_image else None, True)
    for name, expected, result in zip(DETERMINISTIC, stock, ours, strict=True):
        assert result.tokens == expected.tokens, name
        for one, other in zip(expected.answer + expected.prompt, result.answer + result.prompt, strict=True):
            assert one.keys() == other.keys(), name
            assert list(other.values()) == pytest.approx(list(one.values()), abs=1e-4), name


def draw(engine: LLM, num: int, fields: dict[str, Any]) -> list[list[int]]:
    """Tokens of many answers to one prompt, and of the same seed four times."""
    params = SamplingParams(max_tokens=1, **fields, seed=11)
    again = [SamplingParams(max_tokens=6, **fields, seed=11) for _ in range(4)]
    many = [SamplingParams(max_tokens=1, **fields, seed=seed) for seed in range(num)]
    outputs = engine.generate([request(TEXT_ONLY)] * (num + 5), [params, *again, *many], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_seeded_samples_have_the_right_distribution(small_engine: Remote) -> None:
    """Top-k, top-p and temperature against softmax of the log-probabilities; the same seed repeats an answer."""
    fields = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    num = 1500
    tokens = small_engine.call(draw, num, fields)
    assert tokens[1] == tokens[2] == tokens[3] == tokens[4]
    assert tokens[0] == tokens[1][:1]
    probabilities = expected_distribution(small_engine.call(first_logprobs), **fields)
    counts = torch.bincount(torch.tensor([one for (one,) in tokens[5:]]), minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    possible = probabilities > 0
    expected = probabilities[possible] * num
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    freedom = int(possible.sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations of chi squared


def first_logprobs(engine: LLM) -> torch.Tensor:
    """Log-probabilities (V,) of the first token."""
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=-1)
    (output,) = engine.generate([request(TEXT_ONLY)], params, use_tqdm=False)
    (step,) = output.outputs[0].logprobs
    return torch.tensor([step[token].logprob for token in sorted(step)])


def expected_distribution(
    logprobs: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Probabilities (V,) of the tokens that are left, with tokens sorted by hand."""
    scaled = (logprobs / temperature).double()
    order = scaled.argsort(descending=True)[:top_k]
    probabilities = scaled[order].softmax(0)
    left = probabilities.cumsum(0) - probabilities < top_p
    result = torch.zeros(len(logprobs), dtype=torch.float64)
    result[order[left]] = probabilities[left] / probabilities[left].sum()
    return result


@pytest.mark.parametrize("double", [False, True])
def test_noise_is_gumbel_s(double: bool) -> None:
    """Quantiles over positions and tokens, and no correlation between neighbours."""
    noise = np.stack([gumbel_noise(seed=-5, position=p, vocab_size=2001, double=double) for p in range(100)])
    uniform = np.exp(-np.exp(-noise.astype(np.float64)))
    places = np.sort(uniform.reshape(-1))
    distance = np.abs(places - (np.arange(places.size) + 0.5) / places.size).max()
    assert distance < 1.95 / places.size**0.5  # Kolmogorov and Smirnov, 0.1%
    for one, other in ((uniform[:-1], uniform[1:]), (uniform[:, :-1], uniform[:, 1:])):
        assert abs(np.corrcoef(one.reshape(-1), other.reshape(-1))[0, 1]) < 0.01


def test_kernels_are_replaced_once(small_engine: Remote) -> None:
    assert small_engine.call(replace_again)


def replace_again(engine: LLM) -> bool:
    """Whether the engine samples without Triton, and a second call changes nothing."""
    from vllm.triton_utils.dispatcher import KernelOverride
    from vllm.v1.worker.gpu.sample import gumbel

    from ficoco_vllm.hooks.kernels import hook_kernels

    before = gumbel._gumbel_sample_kernel
    hook_kernels()
    return isinstance(before, KernelOverride) and gumbel._gumbel_sample_kernel is before


# Fields that only the Python interface has, and values that only it lets through.
OFFLINE: list[dict[str, Any]] = [
    {"prompt_logprob_token_ids": [[1, 2], [3, 4]]},
    {"prompt_logprob_token_ids": [[1, 2], [3, 4]], "prompt_logprob_start": 1},
    {"prompt_logprob_token_ids": [[10**9]]},
    {"prompt_logprob_start": 1},
    {"flat_logprobs": True, "logprobs": 2},
    {"detokenize": False},
    {"skip_reading_prefix_cache": True},
    {"trace_decode_token_ids": [5, 6, 7]},
    {"extra_args": {"own": {"deep": [None, "x"]}}},
    {"seed": 2**70},
    {"max_tokens": None, "min_tokens": 2**40},
    {"logit_bias": {3: float("nan")}},
    {"frequency_penalty": float("nan")},
    {"temperature": float("inf")},
]


def test_no_two_options_end_the_engine(small_engine: Remote) -> None:
    """All pairs, and what HTTP does not let through, in the process of the engine, which would raise its error."""
    asked = options.pairs() + OFFLINE
    refused = small_engine.call(send, asked)
    assert len(refused) < len(asked) / 2
    assert all(refused.values())


def send(engine: LLM, asked: list[dict[str, Any]]) -> dict[str, str]:
    """Send requests together and wait for the answers.

    Returns:
        Those that the front end refuses, with its message.
    """
    refused = {}
    for fields in asked:
        try:
            engine.enqueue(
                [request(TEXT_ONLY)], [parameters({"max_tokens": 3} | fields, None)], use_tqdm=False
            )
        except (ValueError, VLLMValidationError) as error:
            refused[str(fields)] = str(error)
    engine.wait_for_completion(use_tqdm=False)
    return refused
