"""The paper's efficiency tables beside ours: fills the generated blocks of docs/paper-tables.md.

    python -m ficoco_vllm.benchmarks.efficiency.paper_tables            # rewrite the blocks
    python -m ficoco_vllm.benchmarks.efficiency.paper_tables --check    # exit code 1 if they are not current

Rows count by the paper's schedule, layer by layer, and not by the segments of the served decoder, whose rows are
"measured". The text around the blocks is written by hand. A figure that is more than 5% off and does not round to the
printed one must carry the letter of a note there, or nothing is written.
"""

import sys
from string import ascii_lowercase

from ficoco_vllm.benchmarks.efficiency.tables import TABLES, Row, Table, markdown
from ficoco_vllm.benchmarks.harness.pages import ROOT, fill, table, write_pages
from ficoco_vllm.benchmarks.harness.results import read
from ficoco_vllm.reduction.cost import BITS, ModelShape, TokenPlan, constant, estimate, paper
from ficoco_vllm.reduction.cost.llm_viewer import footprint_bytes, traffic_bytes
from ficoco_vllm.reduction.cost.paper_schedule import decoder_tokens, tower_tokens

PAGE = ROOT / "docs" / "paper-tables.md"
TOLERANCE = 0.05
LLAVA_7B = TABLES[0].shape
# The paper's TFLOPs, total memory in GB and KV cache in MB of each row, by table and data type; a letter is that of the
# note on a figure that is off.
PRINTED = {
    8: {
        "fp16": "8.5 22.4 333 | 1.5a 14.4 65.0 | 1.5a 14.3 64.2 | 1.5 13.0c 60.8",
        "int8": "4.3 11.2 167 | 0.8 7.8d 32.5 | 0.8 7.2 32.1 | 0.7b 6.5c 30.4",
        "int4": "2.1 6.2e 83.4 | 0.4 4.4d 16.3 | 0.4 3.3c 16.1 | 0.4 3.3c 15.2",
    },
    9: {
        "fp16": "28.6 56.1 891 | 15.4 38.6 488 | 15.4 38.4 485 | 15.4 38.3 482",
        "int8": "14.3 28 446 | 7.7 19.3 244 | 7.7 19.2 242 | 7.6 19.2 241",
        "int4": "7.6f 14 223 | 3.9 9.6 122 | 3.9 9.5 121 | 3.8 9.5 120",
    },
}
# No schedule from the 4th layer on has the printed KV cache of FiCoCo-L in Table 8.
EVERYWHERE = 62


def paper_plan(shape: ModelShape, row: Row, schedule: str = "one-shot") -> TokenPlan:
    """Tokens by the paper's schedule: evenly from the tower's 12th layer on, in the decoder from the 4th on."""
    decoder = decoder_tokens(shape, row.tower, row.decoder, schedule)
    return TokenPlan.whole(tower_tokens(shape, row.tower), decoder)


def efficiency_table(which: Table) -> list[str]:
    """Table 8 or 9: paper's figure, ours, and how far ours is off."""
    head = ("Method", "Schedule", "Bits", "TFLOPs", "ours", "off", "Memory GB", "traffic", "off", "footprint")
    shape, lines = which.shape, []
    for dtype, printed in PRINTED[which.number].items():
        for row, figures in zip(which.rows, printed.split(" | "), strict=True):
            schedule, plan = row.schedule, paper_plan(shape, row)
            if (which.number, row.method) == (8, "FiCoCo-L"):
                schedule, plan = f"{EVERYWHERE} everywhere", constant(shape, EVERYWHERE)
            cost = estimate(shape, plan, num_text_tokens=which.num_text_tokens, dtype=dtype)
            tokens = [visual + which.num_text_tokens for visual in plan.decoder]
            # Quantisation changes no operation count: the paper scales it with the bits.
            tflops = cost.decoder_flops / 1e12 * BITS[dtype] / 16
            ours = (tflops, traffic_bytes(shape.decoder, tokens, dtype) / 1e9, cost.kv_bytes / 1e6)
            flops, memory, kv = map(_compared, figures.split(), ours)
            footprint = f"{footprint_bytes(shape.decoder, tokens, dtype) / 1e9:.4g}"
            lines.append([row.method, schedule, dtype.upper(), *flops, *memory, footprint, *kv])
    return table((*head, "KV MB", "ours", "off"), lines)


def _compared(printed: str, ours: float, form: str = ".4g") -> tuple[str, str, str]:
    """The paper's figure, ours, and how far ours is off, with the letter of its note.

    Raises:
        ValueError: a note is missing, or not needed.
    """
    figure = printed.rstrip(ascii_lowercase)
    note, decimals = printed.removeprefix(figure), len(figure.partition(".")[2])
    off = ours / float(figure) - 1
    needs_note = abs(off) > TOLERANCE and f"{ours:.{decimals}f}" != figure
    if needs_note != bool(note):
        raise ValueError(f"ours {ours:.4g}, printed {figure}: note {note!r}, needed: {needs_note}")
    return figure, f"{ours:{form}}", f"{off:+.1%}" + (f" ({note})" if note else "")


def budget_table() -> list[str]:
    """The four FLOPs settings of Table 3, by visual tokens kept."""
    head = ("Visual tokens", "TFLOPs, paper", "TFLOPs, LLM", "off", "TFLOPs with tower", "KV MB")
    rows = []
    for keep, printed in {576: "8.5", 256: "4.2", 192: "3.3", 128: "2.4", 64: "1.5a"}.items():
        plan = paper_plan(LLAVA_7B, Row("FiCoCo-V", keep, keep))
        cost = estimate(LLAVA_7B, plan, num_text_tokens=60)
        compared = _compared(printed, cost.decoder_flops / 1e12, ".3f")
        rows.append((keep, *compared, f"{cost.total_flops / 1e12:.3f}", f"{cost.kv_bytes / 1e6:.1f}"))
    return table(head, rows)


def decoder_table() -> list[str]:
    """FiCoCo-L by the paper's schedule, from the 4th layer on, on the 7B model with 60 text tokens."""
    head = ("Schedule from the 4th layer on", "Kept", "Mean tokens per layer", "TFLOPs, LLM", "KV MB")
    rows = []
    schedules = (("one-shot", 1), ("one-shot", 64), ("geometric", 1), ("geometric", 64), ("even", 1))
    for schedule, keep in schedules:
        plan = paper_plan(LLAVA_7B, Row("FiCoCo-L", decoder=keep), schedule)
        cost = estimate(LLAVA_7B, plan, num_text_tokens=60)
        figures = f"{plan.mean_visual_tokens:.1f}", f"{cost.decoder_flops / 1e12:.2f}"
        rows.append((schedule, keep, *figures, f"{cost.kv_bytes / 1e6:.1f}"))
    return table(head, rows)


def next_table() -> list[str]:
    """Table 10: visual tokens only, a multiply-add counted once."""
    plans = {
        "Open-LLaVA-NeXT-7B: 2880 tokens in every layer": ("20.8", [2880] * 32),
        "1389 tokens in every layer": ("9.5", [1389] * 32),
        "2880, 1440, 720, 360 tokens in 8 layers each": ("9.5", [2880 >> layer // 8 for layer in range(32)]),
    }
    # Half as wide again: the formula counts two matrices in the MLP, Llama has three.
    hidden, mlp = LLAVA_7B.decoder.hidden, LLAVA_7B.decoder.mlp * 3 // 2
    rows = [
        (name, *_compared(printed, sum(paper.layer_flops(n, hidden, mlp) for n in tokens) / 1e12, ".2f"))
        for name, (printed, tokens) in plans.items()
    ]
    return table(("Visual tokens", "T multiply-adds, paper", "ours", "off"), rows)


def equation_table() -> list[str]:
    """Results of Eqs. 16 to 19 for one layer, as printed and by algebra, in millions."""
    tower, decoder = LLAVA_7B.tower, LLAVA_7B.decoder
    cases = {
        "CLIP-L, 43 of 576 removed": (
            paper.encoder_saving_as_printed(576, 43, tower.hidden, tower.mlp),
            paper.layer_saving(576, 43, tower.hidden, tower.mlp),
            paper.encoder_overhead(576, 43, tower.hidden),
        ),
        "Vicuna-7B, 512 of 576 removed, 60 text tokens": (
            paper.decoder_saving_as_printed(576, 512, decoder.hidden, decoder.mlp),
            paper.layer_saving(636, 512, decoder.hidden, decoder.mlp),
            paper.decoder_overhead(576, 512, decoder.hidden),
        ),
    }
    rows = [
        (name, *(f"{value / 1e6:,.2f}" for value in (printed, exact, exact - printed, own)))
        for name, (printed, exact, own) in cases.items()
    ]
    return table(("Layer", "Saving as printed", "by algebra", "missing", "Own work (Eqs. 18, 19)"), rows)


def page() -> str:
    """The page with its blocks."""
    blocks = {"budgets": budget_table(), "decoder": decoder_table()}
    blocks |= {"table-10": next_table(), "equations": equation_table()}
    for which in TABLES:
        blocks[f"table-{which.number}"] = efficiency_table(which)
        blocks[f"measured-{which.number}"] = markdown(which, read("efficiency")["rows"])
    return fill(PAGE.read_text("utf-8"), blocks)


if __name__ == "__main__":
    sys.exit(write_pages(__doc__, lambda: {PAGE: page()}))
