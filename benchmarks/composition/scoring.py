"""How sure the model is of the right answer, from one prefill: far finer than whether it gives it."""

import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ficoco_vllm.benchmarks.accuracy.variant_package import write_package
from ficoco_vllm.benchmarks.accuracy.variants import HOST_METHOD, Variant
from ficoco_vllm.benchmarks.accuracy.workload import Item

MODEL_LENGTH = 1024
# Visual tokens of the demo model's image without reduction.
NUM_TOKENS = 576
BATCH = 64


@dataclass(frozen=True)
class Score:
    """Of one question.

    Attributes:
        logprob: of the right answer with its end, all tokens together.
        right: whether greedy decoding gives it: each of its tokens is the most likely one behind those before it.
    """

    logprob: float
    right: bool


class Scorer:
    """The demo model in this process; requests choose among variants.

    Args:
        variants: those with settings of their own are made known to the engine.
        folder: for them.
        scores: JSONL file of scores; a run that was cut off goes on from it.
    """

    def __init__(self, variants: Sequence[Variant], folder: Path, scores: Path) -> None:
        self._scores = scores
        self._known: dict[tuple[str, str], Score] = {}
        if scores.exists():
            text = scores.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # a run that was killed may have left half a line
            scores.write_text(whole, encoding="utf-8")
            for line in whole.splitlines():
                row = json.loads(line)
                self._known[row["variant"], row["item"]] = Score(row["logprob"], row["right"])
        # Before vLLM is imported.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        write_package(folder, variants)
        sys.path.insert(0, str(folder))
        from vllm import LLM

        from ficoco_vllm.demo_model import path

        self._engine = LLM(
            str(path()),
            additional_config={"ficoco": {"method": HOST_METHOD["tower"], "metrics": False}},
            dtype="float32",
            enforce_eager=True,
            max_model_len=MODEL_LENGTH,
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            seed=0,
            disable_log_stats=True,
        )
        self._tokenizer: Any = self._engine.get_tokenizer()
        self._image_token = self._tokenizer.convert_tokens_to_ids("<image>")

    def score(self, jobs: Sequence[tuple[Variant, Item]]) -> list[Score]:
        """Score questions.

        Args:
            jobs: each a variant of the tower with its question, whose answer is known.

        Raises:
            ValueError: an answer's tokens depend on what stands before them.
            RuntimeError: the engine leaves another number of visual tokens than it was asked for.
        """
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        missing = [(variant, item) for variant, item in jobs if (variant.key, item.name) not in self._known]
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            prompts = [self._prompt(variant, item) for variant, item in batch]
            outputs = self._engine.generate([prompt for prompt, _ in prompts], params, use_tqdm=False)
            for (variant, _), output in zip(batch, outputs, strict=True):
                self._check(variant, output)
            scores = [
                _score(output, num_answer) for output, (_, num_answer) in zip(outputs, prompts, strict=True)
            ]
            self._keep(batch, scores)
        return [self._known[variant.key, item.name] for variant, item in jobs]

    def _keep(self, jobs: Sequence[tuple[Variant, Item]], scores: Sequence[Score]) -> None:
        self._scores.parent.mkdir(parents=True, exist_ok=True)
        with self._scores.open("a", encoding="utf-8") as file:
            for (variant, item), score in zip(jobs, scores, strict=True):
                self._known[variant.key, item.name] = score
                row = {"variant": variant.key, "item": item.name, **asdict(score)}
                file.write(json.dumps(row) + "\n")

    def _check(self, variant: Variant, output: Any) -> None:
        """Whether the prompt that was scored is as short as its budget says."""
        expected = NUM_TOKENS if variant.method is None else variant.keep
        found = output.prompt_token_ids.count(self._image_token)
        if expected is not None and found != expected:
            raise RuntimeError(f"{variant.label}: {found} visual tokens were left, not {expected}")

    def _prompt(self, variant: Variant, item: Item) -> tuple[dict[str, Any], int]:
        """The prompt with its right answer, and how many tokens that has."""
        assert item.image is not None
        question = f"<s>USER: <image>\n{item.question} ASSISTANT:"
        text = f"{question} {item.answer}</s>"
        before, whole = (self._tokenizer(words).input_ids for words in (question, text))
        if whole[: len(before)] != before:
            raise ValueError(f"{item.name}: the answer {item.answer!r} changes the tokens of its question")
        kwargs: dict[str, Any] = {"ficoco_keep": NUM_TOKENS}
        if variant.method is not None:
            kwargs = {"ficoco_method": variant.served_name, "ficoco_keep": variant.keep}
        image = Image.open(io.BytesIO(item.image)).convert("RGB")
        prompt = {"prompt": text, "multi_modal_data": {"image": image}, "mm_processor_kwargs": kwargs}
        return prompt, len(whole) - len(before)


def _score(output: Any, num_answer: int) -> Score:
    steps, tokens = output.prompt_logprobs[-num_answer:], output.prompt_token_ids[-num_answer:]
    told = [step[token] for step, token in zip(steps, tokens, strict=True)]
    return Score(sum(one.logprob for one in told), all(one.rank == 1 for one in told))
