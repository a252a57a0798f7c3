"""Do merged tokens answer better when the decoder's attention counts them as often as they stand for patches?

    python -m ficoco_vllm.benchmarks.accuracy.merged_weight [--count 40] [--out FILE]

A key of a merged token gets `strength * log(size)` added to its logits in every decoder layer after the reduction: 0 is
what the server does, 1 counts a merged token as all its patches (arXiv:2210.09461, Eq. 1, here in the decoder). Hugging
Face's LLaVA with the demo model's weights in float32, one question at a time, greedy.
"""

import argparse
import io
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from ficoco_vllm.benchmarks.accuracy.statistics import paired_bootstrap
from ficoco_vllm.benchmarks.accuracy.workload import SIGNS, Item, embedded
from ficoco_vllm.benchmarks.harness.results import environment
from ficoco_vllm.demo_model import path
from ficoco_vllm.hf import reduce_tokens
from ficoco_vllm.hf.decoder import SegmentedModel
from ficoco_vllm.vision.tower import encode

# Method to budgets; ToMe cannot go below 36 in the demo model's four reducing layers.
VARIANTS = {
    "ficoco-v": (64, 40, 20),
    "spatial-pool": (64, 40, 20),
    "tome": (64, 40),
    "ficoco-l": (64, 40, 20),
}
STRENGTHS = (0.0, 1.0)


class Sizes:
    """Patches that each token of the current prompt stands for, by decoder layer."""

    def __init__(self, model: Any) -> None:
        self.layers = list(model.model.language_model.layers)
        self.image = torch.ones(0)
        self.offset = 0
        self.reduced_after = -1
        self.of_layer: dict[int, Tensor] = {}

    def start(self, offset: int) -> None:
        """Begin a prompt whose image starts at `offset`."""
        self.image, self.offset, self.of_layer = torch.ones(0), offset, {}

    def bias(self, layer: int, num_queries: int, num_keys: int, strength: float) -> Tensor:
        """Causal mask with the weights, (1, 1, queries, keys)."""
        size = torch.ones(num_keys)
        if layer in self.of_layer:
            known = self.of_layer[layer]
            size[: len(known)] = known
        else:
            size[self.offset : self.offset + len(self.image)] = self.image
        causal = torch.full((num_queries, num_keys), -torch.inf).triu(num_keys - num_queries + 1)
        return (causal + strength * size.log())[None, None]


@contextmanager
def weighted(model: Any, sizes: Sizes, strength: float) -> Iterator[None]:
    """Weigh merged tokens in the decoder of a model whose tokens are reduced."""
    attend, reduce = SegmentedModel._attend, SegmentedModel._reduce

    def note_encoded(*args: Any, **kwargs: Any) -> Any:
        kept = encode(*args, **kwargs)
        sizes.image = kept.size[0]
        return kept

    def note_reduced(self: SegmentedModel, rows: Any, heads: Any, edge: Any) -> Any:
        reduced = reduce(self, rows, heads, edge)
        first = sizes.reduced_after + 1
        sizes.of_layer |= dict.fromkeys(range(first, len(sizes.layers)), reduced.size)
        return reduced

    def attend_weighted(
        self: SegmentedModel, layer: Any, hidden: Tensor, valid: Tensor, **kwargs: Any
    ) -> Any:
        sizes.reduced_after = sizes.layers.index(layer)
        kwargs["attention_mask"] = mask(sizes.reduced_after, hidden, kwargs["past_key_values"])
        return attend(self, layer, hidden, valid, **kwargs)

    def mask(index: int, hidden: Tensor, cache: Any) -> Tensor:
        held = 0 if cache is None or index >= len(cache.layers) else cache.layers[index].get_seq_length()
        return sizes.bias(index, hidden.shape[1], held + hidden.shape[1], strength)

    def before(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["attention_mask"] = mask(sizes.layers.index(layer), args[0], kwargs["past_key_values"])
        return args, kwargs

    with ExitStack() as stack:
        stack.enter_context(patch("ficoco_vllm.hf.images.encode", note_encoded))
        stack.enter_context(patch.object(SegmentedModel, "_reduce", note_reduced))
        stack.enter_context(patch.object(SegmentedModel, "_attend", attend_weighted))
        for layer in sizes.layers:
            hook = layer.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(hook.remove)
        yield


def measure(items: list[Item], variants: list[tuple[str, int, float]]) -> dict[str, dict[str, list[bool]]]:
    """Ask every question in every variant: its label to the kinds of question to whether each was answered right."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration.from_pretrained(path(), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path())
    sizes = Sizes(model)
    right: dict[str, dict[str, list[bool]]] = {}
    for method, keep, strength in variants:
        label = f"{method} {keep} {strength}"
        right[label] = defaultdict(list)
        with torch.no_grad(), reduce_tokens(model, method, keep=keep), weighted(model, sizes, strength):
            for item in items:
                assert item.image is not None
                inputs = processor(
                    images=Image.open(io.BytesIO(item.image)),
                    text=f"USER: <image>\n{item.question} ASSISTANT:",
                    return_tensors="pt",
                )
                is_image = inputs["input_ids"][0] == model.config.image_token_id
                sizes.start(int(is_image.nonzero()[0]))
                output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
                answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                right[label][item.kind].append(answer.strip() == item.answer)
        print(label, f"{_mean(right[label]):.3f}", flush=True)
    return right


def _mean(right: dict[str, list[bool]]) -> float:
    return sum(sum(answers) / len(answers) for answers in right.values()) / len(right)


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=40, help="questions of each type about signs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/merged-weight.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    items = embedded(SIGNS, args.count, args.seed)
    variants = [
        (method, keep, strength)
        for method, keeps in VARIANTS.items()
        for keep in keeps
        for strength in STRENGTHS
    ]
    right = measure(items, variants)
    rows = []
    for method, keep, strength in variants:
        plain, here = right[f"{method} {keep} {STRENGTHS[0]}"], right[f"{method} {keep} {strength}"]
        change = paired_bootstrap(plain, here, args.seed)
        rows.append(
            {
                "method": method,
                "keep": keep,
                "strength": strength,
                "accuracy": _mean(here),
                "change": change,
            }
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    head = {"schema": 1, "seed": args.seed, "count": args.count, "environment": environment()}
    args.out.write_text(json.dumps({**head, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
