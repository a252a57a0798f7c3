"""Accuracy of an exported model on the held-out set, each type of question alone.

Greedy decoding returns the correct answer exactly if each of its tokens scores highest given those before it,
so one batched forward with the correct answers is equivalent to generation; tests compare it with `generate`.
"""

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

import ficoco_vllm.demo_model
from ficoco_vllm.benchmarks.questions.held_out import KINDS_OF_QUESTION, Example, held_out
from tools.demo_model.architecture import ARCHITECTURE
from tools.demo_model.decoder import Decoder, Projector
from tools.demo_model.dialogue import Asker, right_answers
from tools.demo_model.features import encode
from tools.demo_model.load import load_exported
from tools.demo_model.vision import VisionTower

BATCH = 10


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on one type of question, in percent.

    Attributes:
        kind: type of question.
        count: number of questions.
        accuracy: answered correctly with all visual tokens.
        majority: share of the most frequent answer.
        without_image: answered correctly without any visual token in the prompt.
    """

    kind: str
    count: int
    accuracy: float
    majority: float
    without_image: float


class Evaluator:
    """Runs an exported model on questions.

    Args:
        folder: the exported model.
        dtype: data type of the computation; the model is served in bf16.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.parts: tuple[VisionTower, Projector, Decoder] = load_exported(folder)
        self.asker = Asker(AutoTokenizer.from_pretrained(folder))
        self.dtype = dtype

    @torch.no_grad()
    def right(self, examples: list[Example], with_image: bool = True) -> list[bool]:
        """Whether each question is answered correctly.

        Args:
            examples: a batch.
            with_image: False omits the visual tokens from the prompt.
        """
        tower, projector, decoder = self.parts
        count = ARCHITECTURE.num_patches if with_image else 0
        if with_image:
            visual = projector(encode(tower, [example.scene for example in examples], self.dtype))
        else:
            visual = torch.zeros(len(examples), 0, ARCHITECTURE.hidden_size, dtype=self.dtype)
        questions = [[example.question] for example in examples]
        position = torch.arange(count).expand(len(examples), -1)
        scores = self.asker.score(decoder, visual, position, count, questions)
        return [row[0] for row in right_answers(scores, questions)]

    def measure(self, kind: str, count: int, seed: int = 0) -> Accuracy:
        """Accuracy on one type of question."""
        examples = held_out(kind, count, seed)
        batches = [examples[start : start + BATCH] for start in range(0, count, BATCH)]
        seen = [verdict for batch in tqdm(batches, desc=kind, leave=False) for verdict in self.right(batch)]
        blind = [verdict for batch in batches for verdict in self.right(batch, with_image=False)]
        majority = Counter(example.question.answer for example in examples).most_common(1)[0][1]
        percent = 100 / count
        return Accuracy(
            kind,
            count,
            round(sum(seen) * percent, 1),
            round(majority * percent, 1),
            round(sum(blind) * percent, 1),
        )


def table(rows: list[Accuracy]) -> str:
    """The rows as a Markdown table."""
    lines = ["| question | n | accuracy | majority | without image |", "|---|---|---|---|---|"]
    lines += [f"| {r.kind} | {r.count} | {r.accuracy} | {r.majority} | {r.without_image} |" for r in rows]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and write `accuracy.json` and `accuracy.txt`."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=ficoco_vllm.demo_model.path(), help="exported model")
    parser.add_argument("--count", type=int, default=300, help="questions of each type")
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out set")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the two files")
    options = parser.parse_args()
    evaluator = Evaluator(options.model)
    rows = [evaluator.measure(kind, options.count, options.seed) for kind in tqdm(KINDS_OF_QUESTION)]
    result = {"seed": options.seed, "dtype": "bfloat16", "rows": [asdict(row) for row in rows]}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "accuracy.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.output / "accuracy.txt").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
