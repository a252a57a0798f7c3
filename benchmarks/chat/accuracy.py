"""`make bench-chat-accuracy`: what decision windows cost in chats about one image.

Each chat is asked its last question, after earlier ones about other things with their right answers. Its answer is
compared between three ways to serve it: all visual tokens are kept; the whole prompt decides which are left; the first
turn does (`"windows": "turn"`). Counts of tokens are the same in the last two. The demo model; methods of the decoder
share an engine, those that reduce twice have one each.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from PIL import Image

from ficoco_vllm import demo_model
from ficoco_vllm.benchmarks.accuracy.statistics import paired_bootstrap, wilson
from ficoco_vllm.benchmarks.chat.questions import KINDS, Chat, held_out_chats
from ficoco_vllm.benchmarks.harness.engine import Remote, bench_engine
from ficoco_vllm.benchmarks.harness.model import PATCHES
from ficoco_vllm.benchmarks.harness.results import environment, make_parser, print_table, write

# Method and visual tokens that are left in the last layer; those of the decoder alone share an engine.
DECODER = [
    ("ficoco-l", 192),
    ("ficoco-l", 128),
    ("ficoco-l", 64),
    ("fitprune", 64),
    ("pyramiddrop", 64),
    ("fastv", 64),
    ("sparsevlm", 64),
]
TWICE = [("ficoco-vl", 64), ("vscan", 64), ("tops", 64)]
ENGINE: dict[str, Any] = {
    "load_format": "auto",
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 2**30,
}
Verdicts = Mapping[str, Sequence[bool]]


def main() -> int:
    """Run, write the JSON, print the table."""
    parser = make_parser(__doc__, "chat-accuracy")
    parser.add_argument(
        "--count", type=int, default=75, help="chats of each type of question (default: %(default)s)"
    )
    args = parser.parse_args()
    chats = [chat for kind in KINDS for chat in held_out_chats(kind, args.count, args.seed)]
    rows: list[dict[str, Any]] = []
    result = {"environment": environment(), "seed": args.seed, "count": args.count, "rows": rows}

    def engine_of(method: str) -> AbstractContextManager[Remote]:
        settings = {"method": method, "keep": 64, "windows": "turn"}
        return bench_engine(demo_model.path(), settings, **ENGINE)

    def measure(engine: Remote, method: str, keep: int, extra: dict[str, Any]) -> None:
        window, lengths = engine.call(ask, chats, [extra] * len(chats))
        whole, _ = engine.call(ask, chats, [{**extra, "ficoco_window": length} for length in lengths])
        figures = compare(*(by_kind(chats, right) for right in (full, whole, window)))
        rows.append({"method": method, "keep": keep, **figures})
        write(result, args.out)

    with engine_of("ficoco-l") as engine:
        full, _ = engine.call(ask, chats, [{"ficoco_keep": PATCHES}] * len(chats))
        for method, keep in DECODER:
            measure(engine, method, keep, {"ficoco_method": method, "ficoco_keep": keep})
    for method, keep in TWICE:
        with engine_of(method) as engine:
            measure(engine, method, keep, {})
    print_table(("", "all tokens", "whole prompt", "windows", "windows - whole"), map(_cells, rows))
    return 0


def ask(
    engine: Any, chats: Sequence[Chat], extras: Sequence[Mapping[str, Any]]
) -> tuple[list[bool], list[int]]:
    """Whether each last question is answered right, and the tokens of each prompt."""
    from vllm import SamplingParams

    params = [SamplingParams(temperature=0, max_tokens=8, extra_args=dict(extra)) for extra in extras]
    outputs = engine.chat([messages(chat) for chat in chats], params, use_tqdm=False)
    right = [
        output.outputs[0].text.strip() == chat.turns[-1].answer
        for output, chat in zip(outputs, chats, strict=True)
    ]
    return right, [len(output.prompt_token_ids) for output in outputs]


def messages(chat: Chat) -> list[dict[str, Any]]:
    """A chat up to its last question, earlier ones with their right answers."""
    result: list[dict[str, Any]] = []
    for turn in chat.turns:
        result.append({"role": "user", "content": turn.text})
        result.append({"role": "assistant", "content": turn.answer})
    image = {"type": "image_pil", "image_pil": Image.fromarray(chat.scene.image)}
    result[0]["content"] = [image, {"type": "text", "text": chat.turns[0].text}]
    return result[:-1]


def by_kind(chats: Sequence[Chat], right: Sequence[bool]) -> dict[str, list[bool]]:
    """Verdicts by the type of the last question."""
    verdicts: dict[str, list[bool]] = {}
    for chat, one in zip(chats, right, strict=True):
        verdicts.setdefault(chat.turns[-1].kind, []).append(one)
    return verdicts


def compare(full: Verdicts, whole: Verdicts, window: Verdicts) -> dict[str, Any]:
    """Accuracies with Wilson's intervals, and the loss by windows with its paired bootstrap interval, in percent."""
    named = {"full": full, "whole": whole, "window": window}
    return {
        "accuracy": {name: _accuracy(verdicts) for name, verdicts in named.items()},
        "window_against_whole": [round(100 * value, 1) for value in paired_bootstrap(whole, window)],
    }


def _accuracy(verdicts: Verdicts) -> list[float]:
    right = [one for some in verdicts.values() for one in some]
    return [round(100 * value, 1) for value in (sum(right) / len(right), *wilson(sum(right), len(right)))]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    shares = [f"{share:.1f}" for share, *_ in row["accuracy"].values()]
    change, low, high = row["window_against_whole"]
    return (f"{row['method']} {row['keep']}", *shares, f"{change:+.1f} ({low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    sys.exit(main())
