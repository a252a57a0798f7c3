"""Weights of merged tokens, against a decoder that reads each token as often as it stands for patches."""

import io
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from ficoco_vllm.benchmarks.accuracy.merged_weight import Sizes, measure, weighted
from ficoco_vllm.benchmarks.accuracy.workload import embedded
from ficoco_vllm.demo_model import path
from ficoco_vllm.hf import reduce_tokens

ITEMS = embedded(("first_digit",), 1, 0)


@pytest.fixture(scope="module")
def llava() -> Any:
    """The demo model in float32."""
    return LlavaForConditionalGeneration.from_pretrained(path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def inputs() -> Any:
    """One question."""
    processor = AutoProcessor.from_pretrained(path())
    image = Image.open(io.BytesIO(ITEMS[0].image or b""))
    text = f"USER: <image>\n{ITEMS[0].question} ASSISTANT:"
    return processor(images=image, text=text, return_tensors="pt")


def first_logits(
    llava: Any, inputs: Any, method: str, strength: float
) -> tuple[torch.Tensor, Sizes, dict[str, Any]]:
    """Logits of the first token, the sizes, and what the decoder's layers read."""
    sizes, read = Sizes(llava), dict[str, Any]()

    def note(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        read.setdefault("embeds", args[0])
        read.setdefault("positions", kwargs["position_ids"])

    hook = llava.model.language_model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    sizes.start(int((inputs["input_ids"][0] == llava.config.image_token_id).nonzero()[0]))
    with torch.no_grad(), reduce_tokens(llava, method, keep=64), weighted(llava, sizes, strength):
        output = llava.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    hook.remove()
    return output.logits[0][0], sizes, read


def test_a_weighted_token_counts_as_all_its_patches(llava: Any, inputs: Any) -> None:
    """Every copy of a token has its place and sees all copies: attention over them is that of one with log(size)."""
    logits, sizes, read = first_logits(llava, inputs, "ficoco-v", 1.0)
    assert len(sizes.image) == 64
    assert sizes.image.max() > 1
    counts = torch.ones(read["embeds"].shape[1], dtype=torch.long)
    counts[sizes.offset : sizes.offset + 64] = sizes.image.long()
    assert torch.equal(counts[sizes.offset : sizes.offset + 64].float(), sizes.image)
    place = torch.arange(len(counts)).repeat_interleave(counts)
    mask = torch.where(place[None] <= place[:, None], 0.0, -torch.inf)[None, None]
    with torch.no_grad():
        hidden = llava.model.language_model(
            inputs_embeds=read["embeds"][:, place],
            position_ids=read["positions"][:, place],
            attention_mask=mask,
        ).last_hidden_state
        expected = llava.lm_head(hidden[0, -1])
    # float32, sums of up to 600 terms in another order; logits are of the order of 10.
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
    plain, *_ = first_logits(llava, inputs, "ficoco-v", 0.0)
    assert (plain - expected).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["ficoco-v", "ficoco-l"])
def test_at_strength_0_nothing_changes(llava: Any, inputs: Any, method: str) -> None:
    logits, *_ = first_logits(llava, inputs, method, 0.0)
    with torch.no_grad(), reduce_tokens(llava, method, keep=64):
        output = llava.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    torch.testing.assert_close(logits, output.logits[0][0], atol=1e-4, rtol=0)


def test_in_the_decoder_layers_after_the_reduction_count_its_patches(llava: Any, inputs: Any) -> None:
    _, sizes, read = first_logits(llava, inputs, "ficoco-l", 1.0)
    num_tokens = read["embeds"].shape[1]
    # As a server that starts with this method and budget reports: 576 tokens in the first four of eight layers.
    kept = {layer: len(known) - (num_tokens - 576) for layer, known in sizes.of_layer.items()}
    assert kept == {4: 448, 5: 320, 6: 192, 7: 64}
    last = sizes.of_layer[7]
    assert last.sum() == num_tokens
    assert last.max() > 1


def test_answers_are_counted_by_variant_and_kind() -> None:
    right = measure(ITEMS, [("ficoco-v", 64, strength) for strength in (0.0, 1.0)])
    assert right.keys() == {"ficoco-v 64 0.0", "ficoco-v 64 1.0"}
    assert all(len(answers["first_digit"]) == 1 for answers in right.values())
