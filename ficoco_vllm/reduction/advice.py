"""Advice on the choice of a method: what is known and what is not. The README and `ficoco-vllm methods` show it."""

import textwrap
from dataclasses import dataclass

# Points: of 100 correct answers of the demo model without reduction, at the paper's four budgets (docs/accuracy.md).
TITLE = "Which method?"


@dataclass(frozen=True)
class Advice:
    """One choice.

    Attributes:
        need: what matters to the user.
        methods: the first one is to be tried first.
        options: options of `ficoco-vllm serve`.
        known: measured here.
        unknown: not measured here.
    """

    need: str
    methods: tuple[str, ...]
    options: str
    known: str
    unknown: str


ADVICE = (
    Advice(
        "safe (the default)",
        ("divprune",),
        "--ficoco-keep 64",
        "Loses at most 1 point at 288 to 64 of 576 tokens on the demo model, and was not tuned on it. Prefill of "
        "LLaVA-1.5-7B takes 4.5 times fewer FLOPs.",
        "Accuracy of a real checkpoint; speed on a GPU.",
    ),
    Advice(
        "fastest",
        ("tome",),
        "--ficoco-method tome --ficoco-keep 64",
        "Reduces inside the tower as `ficoco-v` does, whose first token comes 3.4 times sooner on a CPU; loses 0 "
        "points at 192 tokens, 6 at 64.",
        "Its own time to first token; speed on a GPU.",
    ),
    Advice(
        "as in the paper",
        ("ficoco-v", "ficoco-l", "ficoco-vl"),
        "--ficoco-method ficoco-v --ficoco-keep 64",
        "The paper's equations in tower, decoder and both. On the demo model `ficoco-v` loses 14 points at 64 tokens, "
        "`ficoco-l` 16, `ficoco-vl` 26; `best`, a composition tuned on this model, loses 0.",
        "Whether the paper's own figures hold here: no real checkpoint was run.",
    ),
    Advice(
        "documents and OCR",
        ("divprune", "best"),
        "--ficoco-keep 192",
        "Both read every number on the demo model's signs at 192, 128 and 64 tokens; `ficoco-v` misses up to 5 in 10 "
        "at 64.",
        "Dense text: in the paper, TextVQA loses more than ScienceQA. Measure yours: `ficoco-vllm calibrate`.",
    ),
    Advice(
        "long chats",
        ("divprune",),
        "--ficoco-keep 64",
        "Methods of the tower keep prefix caching, and each image takes 64 tokens of KV cache in place of 576: 59 "
        "concurrent requests in place of 12. Methods of the decoder reuse whole turns: `ficoco-l` takes 20 requests.",
        "Accuracy of later turns: the tokens are chosen once, before any question.",
    ),
)


def as_text(width: int) -> list[str]:
    """The table for a terminal.

    Args:
        width: columns of the terminal.
    """
    lines = [TITLE]
    for advice in ADVICE:
        lines += ["", f"  {advice.need}: {', '.join(advice.methods)}", f"    serve with   {advice.options}"]
        for title, text in (("known", advice.known), ("not known", advice.unknown)):
            lines += textwrap.wrap(
                text,
                width,
                initial_indent=f"    {title:<13}",
                subsequent_indent=" " * 17,
                break_on_hyphens=False,
            )
    return lines


def as_markdown() -> str:
    """The table as Markdown, without a newline at the end."""
    rows = [("you want", "method", "options", "known", "not known"), ("---",) * 5]
    for advice in ADVICE:
        names = ", ".join(f"`{name}`" for name in advice.methods)
        rows.append((advice.need, names, f"`{advice.options}`", advice.known, advice.unknown))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
