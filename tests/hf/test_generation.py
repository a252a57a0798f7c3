"""Ways of generating and calling a model whose tokens are reduced."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ficoco_vllm.demo_model import examples
from ficoco_vllm.hf import apply, reduce_tokens, remove
from ficoco_vllm.reduction.pipeline import PIPELINES
from tests.support.hugging_face import HfLlava, Prompt
from tests.support.random_llava import build

PROMPT = "<s>USER: <image>\nwhat number is on the sign? ASSISTANT:"
TWO_IMAGES = "<s>USER: <image>\n<image>\nhow many signs are there? ASSISTANT:"
TEXT_ONLY = "<s>USER: is there a red sign? ASSISTANT:"
# One method each for the tower, the decoder and both, and one of the tower that reads the question.
METHODS = ("ficoco-v", "ficoco-l", "ficoco-vl", "cdpruner")
# Batches of other sizes sum float32 in other orders.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def prompts(images: list[Image.Image]) -> list[Prompt]:
    """Different lengths, numbers of images and places of the image."""
    return [(PROMPT, images[:1]), (TWO_IMAGES, images[1:3]), (TEXT_ONLY, []), ("<image>what?", images[3:4])]


def generated(hf: HfLlava, prompts: list[Prompt], **options: Any) -> torch.Tensor:
    """New tokens of a batch."""
    inputs = hf.inputs(prompts)
    output = hf.model.generate(**inputs, max_new_tokens=6, **options)
    return output[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["greedy", "beams", "several"],
)
def test_a_batch_equals_each_prompt_alone(
    small_hf: HfLlava, prompts: list[Prompt], method: str, options: dict[str, Any]
) -> None:
    with reduce_tokens(small_hf.model, method, 16):
        together = generated(small_hf, prompts, do_sample=False, **options)
        alone = [generated(small_hf, [prompt], do_sample=False, **options) for prompt in prompts]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("method", METHODS)
def test_sampling(small_hf: HfLlava, prompts: list[Prompt], method: str) -> None:
    with reduce_tokens(small_hf.model, method, 16):
        torch.manual_seed(0)
        sampled = generated(small_hf, prompts, do_sample=True, top_k=5, num_return_sequences=2)
    assert sampled.shape == (8, 6)


def test_assisted_generation(small_hf: HfLlava, images: list[Image.Image]) -> None:
    """Prompt lookup takes tokens back that the model rejects; greedy tokens stay the same."""
    prompts: list[Prompt] = [("<s><image>\nab ab ab ab ab", images[:1])]
    with reduce_tokens(small_hf.model, "ficoco-v", 16):
        greedy = generated(small_hf, prompts, do_sample=False)
        looked_up = generated(small_hf, prompts, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, looked_up)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_model_itself(small_hf: HfLlava, prompts: list[Prompt], method: str, side: str) -> None:
    """Logits have the caller's places; those after the prompt's end are the ones that `generate` reads."""
    small_hf.processor.tokenizer.padding_side = side
    try:
        inputs = small_hf.inputs(prompts)
    finally:
        small_hf.processor.tokenizer.padding_side = "left"
    with torch.no_grad(), reduce_tokens(small_hf.model, method, 16):
        expected = [logprobs[0] for _, logprobs in small_hf.ask(prompts, 1)]
        output = small_hf.model(**inputs, labels=inputs["input_ids"], use_cache=False)
        last = small_hf.model(**inputs, logits_to_keep=1)
    assert output.past_key_values is None
    assert output.logits.shape[:2] == inputs["input_ids"].shape
    assert output.loss.isfinite()
    if side == "left":
        torch.testing.assert_close(last.logits, output.logits[:, -1:], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(
        output.logits[:, -1].log_softmax(-1), torch.stack(expected), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_scored_as_they_are_generated(
    small_hf: HfLlava, prompts: list[Prompt], method: str
) -> None:
    """Tokens after the prompt, one by one with a cache of the model's own making."""
    inputs = small_hf.inputs(prompts)
    with torch.no_grad(), reduce_tokens(small_hf.model, method, 16):
        answers = small_hf.ask(prompts, 4)
        output = small_hf.model(**inputs)
        mask = inputs["attention_mask"]
        for step in range(4):
            torch.testing.assert_close(
                output.logits[:, -1].log_softmax(-1),
                torch.stack([logprobs[step] for _, logprobs in answers]),
                atol=TOLERANCE,
                rtol=0,
            )
            mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
            tokens = torch.tensor([[tokens[step]] for tokens, _ in answers])
            output = small_hf.model(tokens, attention_mask=mask, past_key_values=output.past_key_values)


@pytest.mark.parametrize("with_image", [False, True])
def test_a_chat_goes_on_with_its_cache(
    small_hf: HfLlava, images: list[Image.Image], with_image: bool
) -> None:
    """A second turn equals the whole chat, with the tower's tokens of both images."""
    more = "<image>and this? ASSISTANT:" if with_image else "are you sure? ASSISTANT:"
    first = small_hf.inputs([(PROMPT, images[:1])])
    model = small_hf.model
    with reduce_tokens(model, "ficoco-v", 16):
        output = model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        second = small_hf.inputs([(more, images[1:2] if with_image else [])])
        ids = torch.cat([output.sequences, second["input_ids"]], dim=1)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
        new = {name: value for name, value in second.items() if name == "pixel_values"}
        continued = model.generate(ids, past_key_values=output.past_key_values, **new, **options)
        pixels = torch.cat([first["pixel_values"], *new.values()])
        whole = model.generate(ids, pixel_values=pixels, **options)
    assert torch.equal(continued, whole)


def test_a_chat_goes_on_after_a_reduction_in_the_decoder(
    small_hf: HfLlava, images: list[Image.Image]
) -> None:
    """The cache keeps the tokens that the first prompt left; a new image is refused."""
    first = small_hf.inputs([(PROMPT, images[:1])])
    with reduce_tokens(small_hf.model, "ficoco-l", 16):
        output = small_hf.model.generate(**first, max_new_tokens=3, return_dict_in_generate=True)
        lengths = [layer.keys.shape[2] for layer in output.past_key_values.layers]
        assert lengths[0] - lengths[-1] == 144 - 16
        ids = torch.cat([output.sequences, small_hf.inputs([("why?", [])])["input_ids"]], dim=1)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2}
        cache = copy.deepcopy(output.past_key_values)
        small_hf.model.generate(ids, past_key_values=cache, **options)
        assert [layer.keys.shape[2] for layer in cache.layers] == [
            length + ids.shape[1] + 1 - first["input_ids"].shape[1] - 2 for length in lengths
        ]
        second = small_hf.inputs([("<image>and this?", images[1:2])])
        ids = torch.cat([output.sequences, second["input_ids"]], dim=1)
        with pytest.raises(
            ValueError, match="is not allowed with new images: ficoco-l reduces in the decoder"
        ):
            small_hf.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=second["pixel_values"],
                past_key_values=output.past_key_values,
            )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "attention"), [(torch.float32, "eager"), (torch.float64, "sdpa")], ids=str)
def test_attention_and_float64(
    small_folder: Path,
    small_hf: HfLlava,
    prompts: list[Prompt],
    method: str,
    dtype: torch.dtype,
    attention: str,
) -> None:
    other = HfLlava(small_folder, dtype, attn_implementation=attention)
    with reduce_tokens(small_hf.model, method, 16), reduce_tokens(other.model, method, 16):
        expected, answers = small_hf.ask(prompts, 1), other.ask(prompts, 1)
    for (_, exact), (_, logprobs) in zip(expected, answers, strict=True):
        torch.testing.assert_close(logprobs, exact, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(demo_model: Path, dtype: torch.dtype) -> None:
    """The trained model answers as in float32; one near tie of six may be decided otherwise."""
    prompts: list[Prompt] = [
        (f"<s>USER: <image>\n{example.question} ASSISTANT:", [Image.open(example.image).convert("RGB")])
        for example in examples()
    ]
    models = HfLlava(demo_model), HfLlava(demo_model, dtype)
    for method, keep in (("ficoco-v", 192), ("ficoco-l", 192)):
        answers = []
        for hf in models:
            with reduce_tokens(hf.model, method, keep):
                texts = hf.processor.batch_decode([tokens for tokens, _ in hf.ask(prompts, 8)])
            answers.append([text.split("</s>")[0] for text in texts])
        assert sum(half == full for half, full in zip(*answers, strict=True)) >= len(prompts) - 1


@pytest.mark.parametrize("method", [*METHODS, "pyramiddrop", "tome", "visionzip"])
def test_autocast(demo_model: Path, method: str) -> None:
    """Linear layers compute in bfloat16 beside a residual stream in float32, as under accelerate's mixed precision.

    A reduction picks other tokens in bfloat16, how many depends on the CPU: with AVX512-BF16 half of FiCoCo-VL's 64 are
    those of float32. The logits of unlikely tokens move with them, by up to 1 for each reduction; the answer does not.
    """
    hf = HfLlava(demo_model)
    example = examples()[0]
    prompt = f"<s>USER: <image>\n{example.question} ASSISTANT:"
    prompts: list[Prompt] = [(prompt, [Image.open(example.image).convert("RGB")])]
    with reduce_tokens(hf.model, method, 64):
        ((expected, exact),) = hf.ask(prompts, 2)
        with torch.autocast("cpu", torch.bfloat16):
            ((tokens, logprobs),) = hf.ask(prompts, 2)
    assert tokens == expected
    torch.testing.assert_close(logprobs[0], exact[0], atol=2.0 if method in PIPELINES else 1.0, rtol=0)
    total_variation = 0.5 * (logprobs[0].exp() - exact[0].exp()).abs().sum()
    assert total_variation < 1e-3


def test_a_tower_that_hands_cls_on(tmp_path: Path, images: list[Image.Image]) -> None:
    hf = HfLlava(build(tmp_path, select="full", patch_size=16, decoder_layers=4))
    with reduce_tokens(hf.model, "ficoco-v", 16) as reduction:
        hf.ask([(PROMPT, images[:1])], 1)
    assert reduction.tokens == (1, 145, 17, 17)
    assert reduction.kept[0][0] == -1
    with pytest.raises(ValueError, match="'full' hands"):
        apply(hf.model, "ficoco-l", 16)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_changes_where_nothing_leaves(small_hf: HfLlava, prompts: list[Prompt], method: str) -> None:
    """Bit-identical: all tokens kept, prompts of text only, and after the reduction has been removed."""
    before = small_hf.ask(prompts)
    text_only = small_hf.ask([(TEXT_ONLY, [])])
    with reduce_tokens(small_hf.model, method, 144) as reduction:
        all_kept = small_hf.ask(prompts)
    assert reduction.tokens == (4, 4 * 144, 4 * 144, 4 * 144)
    with reduce_tokens(small_hf.model, method, 16):
        assert small_hf.ask(prompts)[0][1].ne(before[0][1]).any()
        (same,) = small_hf.ask([(TEXT_ONLY, [])])
    assert torch.equal(same[1], text_only[0][1])
    for (_, expected), (_, kept), (_, after) in zip(before, all_kept, small_hf.ask(prompts), strict=True):
        assert torch.equal(expected, kept)
        assert torch.equal(expected, after)
    assert not {"forward", "get_image_features", "_ficoco"} & set(vars(small_hf.model.model))


@pytest.mark.parametrize("method", METHODS)
def test_threads_share_a_reduced_model(small_hf: HfLlava, prompts: list[Prompt], method: str) -> None:
    with reduce_tokens(small_hf.model, method, 16) as reduction:
        expected = [small_hf.ask([prompt])[0][1] for prompt in prompts]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda prompt: small_hf.ask([prompt])[0][1], prompts))
    for logprobs, exact in zip(answers, expected, strict=True):
        torch.testing.assert_close(logprobs, exact, atol=TOLERANCE, rtol=0)
    assert reduction.tokens.images == 2 * 4


def test_a_copy_of_a_reduced_model_is_reduced(small_hf: HfLlava, prompts: list[Prompt]) -> None:
    reduction = apply(small_hf.model, "ficoco-v", 16)
    try:
        other = copy.copy(small_hf)
        other.model = copy.deepcopy(small_hf.model)
        expected = small_hf.ask(prompts, 2)
    finally:
        remove(small_hf.model)
    seen = reduction.tokens
    for (_, logprobs), (_, exact) in zip(other.ask(prompts, 2), expected, strict=True):
        assert torch.equal(logprobs, exact)
    assert reduction.tokens == seen
    remove(other.model)
