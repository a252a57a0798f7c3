"""`make bench-chat-accuracy`: what decision windows cost in chats about one image.

Each chat is asked its last question, after earlier ones about other things with their right answers. Its answer is
compared between three ways to serve it: all visual tokens are kept; the whole prompt decides which are left; the first
turn does (`"windows": "turn"`). Counts of tokens are the same in the last two. The demo model; methods of the decoder
share an engine, those that reduce twice have one each.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ficoco_vllm import demo_model
from ficoco_vllm.benchmarks.accuracy.statistics import paired_bootstrap, wilson
from ficoco_vllm.benchmarks.chat.questions import KINDS, Chat, held_out_chats
from ficoco_vllm.benchmarks.harness.engine import IN_PROCESS, INTERPRETER, remote_engine
from ficoco_vllm.benchmarks.harness.results import environment, make_parser, print_table, write
from ficoco_vllm.compat import is_cpu_build

NUM_PATCHES = 576
# Method and visual tokens that are left in the last layer.
VARIANTS = [
    ("ficoco-l", 192),
    ("ficoco-l", 128),
    ("ficoco-l", 64),
    ("fitprune", 64),
    ("pyramiddrop", 64),
    ("fastv", 64),
    ("sparsevlm", 64),
]
# Methods that reduce in the tower as well, each with its budget.
TWICE = [("ficoco-vl", 64), ("vscan", 64), ("tops", 64)]
ENGINE: dict[str, Any] = {"block_size": 32, "max_model_len": 1024, "max_num_seqs": 8}
Verdicts = Mapping[str, Sequence[bool]]


def main() -> int:
    """Run, write the JSON, print the table."""
    parser = make_parser(__doc__, "chat-accuracy")
    parser.add_argument(
        "--count", type=int, default=75, help="chats of each type of question (default: %(default)s)"
    )
    args = parser.parse_args()
    chats = {kind: held_out_chats(kind, args.count, args.seed) for kind in KINDS}
    variables = {**IN_PROCESS, "VLLM_CPU_KVCACHE_SPACE": "1", **(INTERPRETER if is_cpu_build() else {})}
    flat = [chat for some in chats.values() for chat in some]
    result: dict[str, Any] = {
        "environment": environment(),
        "seed": args.seed,
        "count": args.count,
        "rows": [],
    }
    header = ("", "all tokens", "whole prompt", "windows", "whole - all", "windows - all", "windows - whole")

    def measure(engine: Any, method: str, keep: int, full: Sequence[bool], extra: dict[str, Any]) -> None:
        window, lengths = engine.call(ask, flat, [extra] * len(flat))
        whole, _ = engine.call(ask, flat, [{**extra, "ficoco_window": length} for length in lengths])
        figures = compare(*(by_kind(chats, right) for right in (full, whole, window)))
        result["rows"].append({"method": method, "keep": keep, **figures})
        write(result, args.out)

    settings = {"method": "ficoco-l", "keep": 64, "windows": "turn"}
    with remote_engine(demo_model.path(), settings, variables, **ENGINE) as engine:
        full, _ = engine.call(ask, flat, [{"ficoco_keep": NUM_PATCHES}] * len(flat))
        for method, keep in VARIANTS:
            measure(engine, method, keep, full, {"ficoco_method": method, "ficoco_keep": keep})
    for method, keep in TWICE:
        settings = {"method": method, "keep": keep, "windows": "turn"}
        with remote_engine(demo_model.path(), settings, variables, **ENGINE) as engine:
            measure(engine, method, keep, full, {})
    print_table(header, [_cells(row) for row in result["rows"]])
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


def by_kind(chats: Mapping[str, Sequence[Chat]], right: Sequence[bool]) -> dict[str, list[bool]]:
    """Verdicts by the type of the last question, in the order of `chats`."""
    verdicts = iter(right)
    return {kind: [next(verdicts) for _ in some] for kind, some in chats.items()}


def compare(full: Verdicts, whole: Verdicts, window: Verdicts) -> dict[str, Any]:
    """Accuracies with Wilson's intervals, and differences with those of the paired bootstrap, in percent."""
    named = {"full": full, "whole": whole, "window": window}
    pairs = {"whole_against_full": (full, whole), "window_against_full": (full, window)}
    pairs["window_against_whole"] = (whole, window)
    return {
        "accuracy": {name: _accuracy(verdicts) for name, verdicts in named.items()},
        **{
            name: [round(100 * value, 1) for value in paired_bootstrap(*pair)] for name, pair in pairs.items()
        },
    }


def _accuracy(verdicts: Verdicts) -> list[float]:
    right = [one for some in verdicts.values() for one in some]
    return [round(100 * value, 1) for value in (sum(right) / len(right), *wilson(sum(right), len(right)))]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    shares = [f"{row['accuracy'][name][0]:.1f}" for name in ("full", "whole", "window")]
    changes = [
        "{:+.1f} ({:+.1f} to {:+.1f})".format(*row[name])
        for name in ("whole_against_full", "window_against_full", "window_against_whole")
    ]
    return (f"{row['method']} {row['keep']}", *shares, *changes)


if __name__ == "__main__":
    sys.exit(main())
