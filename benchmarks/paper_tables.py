"""The paper's efficiency tables beside ours: fills the generated blocks of docs/paper-tables.md.

    python -m ficoco_vllm.benchmarks.paper_tables            # rewrite the blocks
    python -m ficoco_vllm.benchmarks.paper_tables --check    # exit code 1 if they are not current

Rows count by the paper's schedule, layer by layer, and not by the segments of the served decoder, whose rows are
"measured". The text around the blocks is written by hand. A figure that is more than 5% off and does not round to the
printed one must carry the letter of a note there, or nothing is written.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ficoco_vllm.benchmarks.harness.pages import ROOT, fill, table, write_pages
from ficoco_vllm.reduction.cost import (
    BITS,
    KNOWN_MODELS,
    ModelShape,
    TokenPlan,
    constant,
    estimate,
    model_shape,
    paper,
    unreduced,
)
from ficoco_vllm.reduction.cost.llm_viewer import footprint_bytes, traffic_bytes
from ficoco_vllm.reduction.cost.paper_schedule import decoder_tokens, tower_tokens

PAGE = ROOT / "docs" / "paper-tables.md"
TOLERANCE = 0.05
LLAVA_7B = model_shape(KNOWN_MODELS["llava-hf/llava-1.5-7b-hf"])
LLAVA_13B = model_shape(KNOWN_MODELS["llava-hf/llava-1.5-13b-hf"])

Row = Sequence[str]


@dataclass(frozen=True)
class Case:
    """A row of the paper's tables before quantisation: a method and the paper's schedule that our figures assume."""

    method: str
    schedule: str
    plan: TokenPlan


@dataclass(frozen=True)
class Table:
    """One of Tables 8 and 9.

    Attributes:
        printed: the paper's TFLOPs, total memory in GB and KV cache in MB, by data type and row.
        notes: letters for figures that are off, by data type, method and column.
    """

    shape: ModelShape
    num_text_tokens: int
    cases: Sequence[Case]
    printed: dict[str, list[list[str]]]
    notes: dict[tuple[str, str, str], str]


def in_tower(shape: ModelShape, keep: int) -> Case:
    """FiCoCo-V: even removals in the 12th to 23rd layer of the tower."""
    plan = TokenPlan.whole(tower_tokens(shape, keep), (keep,) * (shape.decoder.num_layers + 1))
    return Case("FiCoCo-V", f"V: {keep}", plan)


def everywhere(method: str, shape: ModelShape, num_visual_tokens: int) -> Case:
    """The same count in every decoder layer, which no method has that reduces inside the decoder."""
    return Case(method, f"{num_visual_tokens} everywhere", constant(shape, num_visual_tokens))


def in_decoder(method: str, shape: ModelShape, encoder_keep: int, keep: int) -> Case:
    """All at once in the 4th decoder layer, after a tower that keeps `encoder_keep`."""
    encoder = tower_tokens(shape, encoder_keep)
    decoder = decoder_tokens(shape, encoder_keep, keep, "one-shot")
    tower = f"V: {encoder_keep}, " if encoder_keep < shape.tower.num_patches else ""
    return Case(
        method, f"{tower}L: {decoder[0]} in layers 1-4, {keep} after", TokenPlan.whole(encoder, decoder)
    )


def _rows(text: str) -> list[list[str]]:
    """Printed figures of each row: TFLOPs, memory and KV cache."""
    return [row.split() for row in text.split("|")]


TABLE_8 = Table(
    LLAVA_7B,
    60,
    (
        Case("LLaVA-1.5", "none", unreduced(LLAVA_7B)),
        in_tower(LLAVA_7B, 64),
        everywhere("FiCoCo-L", LLAVA_7B, 62),
        in_decoder("FiCoCo-VL", LLAVA_7B, 70, 54),
    ),
    {
        "fp16": _rows("8.5 22.4 333 | 1.5 14.4 65.0 | 1.5 14.3 64.2 | 1.5 13.0 60.8"),
        "int8": _rows("4.3 11.2 167 | 0.8 7.8 32.5 | 0.8 7.2 32.1 | 0.7 6.5 30.4"),
        "int4": _rows("2.1 6.2 83.4 | 0.4 4.4 16.3 | 0.4 3.3 16.1 | 0.4 3.3 15.2"),
    },
    {
        ("fp16", "FiCoCo-V", "TFLOPs"): "a",
        ("fp16", "FiCoCo-L", "TFLOPs"): "a",
        ("int8", "FiCoCo-VL", "TFLOPs"): "b",
        ("fp16", "FiCoCo-VL", "memory"): "c",
        ("int8", "FiCoCo-VL", "memory"): "c",
        ("int4", "FiCoCo-L", "memory"): "c",
        ("int4", "FiCoCo-VL", "memory"): "c",
        ("int8", "FiCoCo-V", "memory"): "d",
        ("int4", "FiCoCo-V", "memory"): "d",
        ("int4", "LLaVA-1.5", "memory"): "e",
    },
)
TABLE_9 = Table(
    LLAVA_13B,
    512,
    (
        Case("LLaVA-1.5", "none", unreduced(LLAVA_13B)),
        in_tower(LLAVA_13B, 84),
        in_decoder("FiCoCo-L", LLAVA_13B, 576, 25),
        in_decoder("FiCoCo-VL", LLAVA_13B, 94, 74),
    ),
    {
        "fp16": _rows("28.6 56.1 891 | 15.4 38.6 488 | 15.4 38.4 485 | 15.4 38.3 482"),
        "int8": _rows("14.3 28 446 | 7.7 19.3 244 | 7.7 19.2 242 | 7.6 19.2 241"),
        "int4": _rows("7.6 14 223 | 3.9 9.6 122 | 3.9 9.5 121 | 3.8 9.5 120"),
    },
    {("int4", "LLaVA-1.5", "TFLOPs"): "f"},
)


def efficiency_table(which: Table) -> list[str]:
    """Table 8 or 9: paper's figure, ours, and how far ours is off."""
    head = ("Method", "Schedule", "Bits", "TFLOPs", "ours", "off", "Memory GB", "traffic", "off", "footprint")
    rows: list[Row] = [(*head, "KV MB", "ours", "off")]
    unused = dict(which.notes)
    for dtype, printed in which.printed.items():
        for case, figures in zip(which.cases, printed, strict=True):
            ours, footprint = _figures(which, case, dtype)
            cells = [case.method, case.schedule, dtype.upper()]
            for name, figure, value in zip(("TFLOPs", "memory", "KV"), figures, ours, strict=True):
                note = unused.pop((dtype, case.method, name), "")
                cells += [figure, f"{value:.4g}", _off(value, figure, note)]
                cells += [f"{footprint:.4g}"] if name == "memory" else []
            rows.append(cells)
    if unused:
        raise ValueError(f"notes for figures that need none: {unused}")
    return table(rows[0], rows[1:])


def _figures(table: Table, case: Case, dtype: str) -> tuple[tuple[float, float, float], float]:
    cost = estimate(table.shape, case.plan, num_text_tokens=table.num_text_tokens, dtype=dtype)
    tokens = [visual + table.num_text_tokens for visual in case.plan.decoder]
    # Quantisation changes no operation count: the paper scales it with the bits.
    tflops = cost.decoder_flops / 1e12 * BITS[dtype] / 16
    traffic = traffic_bytes(table.shape.decoder, tokens, dtype) / 1e9
    return (tflops, traffic, cost.kv_bytes / 1e6), footprint_bytes(table.shape.decoder, tokens, dtype) / 1e9


def _off(ours: float, printed: str, note: str) -> str:
    decimals = len(printed.partition(".")[2])
    needs_note = abs(ours / float(printed) - 1) > TOLERANCE and f"{ours:.{decimals}f}" != printed
    if needs_note != bool(note):
        raise ValueError(f"ours {ours:.4g}, printed {printed}: note {note!r}, needed: {needs_note}")
    return f"{ours / float(printed) - 1:+.1%}" + (f" ({note})" if note else "")


def budget_table() -> list[str]:
    """The four FLOPs settings of Table 3, by visual tokens kept."""
    rows: list[Row] = [("Visual tokens", "TFLOPs, paper", "TFLOPs, LLM", "off", "TFLOPs with tower", "KV MB")]
    points = {576: ("8.5", ""), 256: ("4.2", ""), 192: ("3.3", ""), 128: ("2.4", ""), 64: ("1.5", "a")}
    for keep, (printed, note) in points.items():
        cost = estimate(LLAVA_7B, in_tower(LLAVA_7B, keep).plan, num_text_tokens=60)
        ours = cost.decoder_flops / 1e12
        cells = (str(keep), printed, f"{ours:.3f}", _off(ours, printed, note))
        rows.append((*cells, f"{cost.total_flops / 1e12:.3f}", f"{cost.kv_bytes / 1e6:.1f}"))
    return table(rows[0], rows[1:])


def decoder_table() -> list[str]:
    """FiCoCo-L by the paper's schedule, from the 4th layer on, on the 7B model with 60 text tokens."""
    rows: list[Row] = [
        ("Schedule from the 4th layer on", "Kept", "Mean tokens per layer", "TFLOPs, LLM", "KV MB")
    ]
    schedules = (("one-shot", 1), ("one-shot", 64), ("geometric", 1), ("geometric", 64), ("even", 1))
    for schedule, keep in schedules:
        decoder = decoder_tokens(LLAVA_7B, 576, keep, schedule)
        plan = TokenPlan.whole(unreduced(LLAVA_7B).encoder, decoder)
        cost = estimate(LLAVA_7B, plan, num_text_tokens=60)
        figures = (
            f"{plan.mean_visual_tokens:.1f}",
            f"{cost.decoder_flops / 1e12:.2f}",
            f"{cost.kv_bytes / 1e6:.1f}",
        )
        rows.append((schedule, str(keep), *figures))
    return table(rows[0], rows[1:])


def next_table() -> list[str]:
    """Table 10: visual tokens only, a multiply-add counted once."""
    plans: tuple[tuple[str, str, Sequence[int]], ...] = (
        ("Open-LLaVA-NeXT-7B: 2880 tokens in every layer", "20.8", (2880,) * 32),
        ("1389 tokens in every layer", "9.5", (1389,) * 32),
        ("2880, 1440, 720, 360 tokens in 8 layers each", "9.5", [2880 >> layer // 8 for layer in range(32)]),
    )
    rows: list[Row] = [("Visual tokens", "T multiply-adds, paper", "ours", "off")]
    for name, printed, tokens in plans:
        shape = LLAVA_7B.decoder
        # Half as wide again: the formula counts two matrices in the MLP, Llama has three.
        ours = sum(paper.layer_flops(n, shape.hidden, shape.mlp * 3 // 2) for n in tokens) / 1e12
        rows.append((name, printed, f"{ours:.2f}", _off(ours, printed, "")))
    return table(rows[0], rows[1:])


def equation_table() -> list[str]:
    """Results of Eqs. 16 to 19 for one layer, as printed and by algebra, in millions."""
    tower, decoder = LLAVA_7B.tower, LLAVA_7B.decoder
    encoder = (576, 43, tower.hidden, tower.mlp)
    rows: list[Row] = [("Layer", "Saving as printed", "by algebra", "missing", "Own work (Eqs. 18, 19)")]
    cases = (
        (
            "CLIP-L, 43 of 576 removed",
            paper.encoder_saving_as_printed(*encoder),
            encoder,
            paper.encoder_overhead,
        ),
        (
            "Vicuna-7B, 512 of 576 removed, 60 text tokens",
            paper.decoder_saving_as_printed(576, 512, decoder.hidden, decoder.mlp),
            (636, 512, decoder.hidden, decoder.mlp),
            paper.decoder_overhead,
        ),
    )
    for name, printed, arguments, overhead in cases:
        exact = paper.layer_saving(*arguments)
        own = overhead(576, arguments[1], arguments[2])
        rows.append((name, *(f"{value / 1e6:,.2f}" for value in (printed, exact, exact - printed, own))))
    return table(rows[0], rows[1:])


def served_table(index: int) -> list[str]:
    """Table 8 or 9 as `make bench-efficiency` measured it, which is not in the wheel."""
    from ficoco_vllm.benchmarks.efficiency.rows import TABLES, markdown
    from ficoco_vllm.benchmarks.harness.results import read

    return markdown(TABLES[index], read("efficiency")["rows"])


BLOCKS: dict[str, Callable[[], list[str]]] = {
    "table-8": lambda: efficiency_table(TABLE_8),
    "table-9": lambda: efficiency_table(TABLE_9),
    "budgets": budget_table,
    "decoder": decoder_table,
    "table-10": next_table,
    "equations": equation_table,
    "measured-8": lambda: served_table(0),
    "measured-9": lambda: served_table(1),
}


def main() -> int:
    """Rewrite the page, or check it."""
    blocks = ((name, block()) for name, block in BLOCKS.items())
    return write_pages(__doc__, lambda: {PAGE: fill(PAGE.read_text("utf-8"), dict(blocks))})


if __name__ == "__main__":
    sys.exit(main())
