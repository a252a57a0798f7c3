"""All stages by name. Any filter goes with any correlation and any compression."""

from collections.abc import Mapping

from ficoco_vllm.reduction.stages import compress, correlate, filter
from ficoco_vllm.reduction.stages.stage import Stage

FILTERS: Mapping[str, Stage] = {
    "local_task": Stage(filter.local_task, filter.local_task_signals, filter.LocalTask),
    "cls_attention": Stage(filter.cls_attention, frozenset({"cls_attention"})),
}

CORRELATIONS: Mapping[str, Stage] = {
    "none": Stage(correlate.none),
    "attention": Stage(correlate.attention, frozenset({"visual_attention"})),
    "key_cosine": Stage(correlate.key_cosine, frozenset({"keys"})),
}

COMPRESSIONS: Mapping[str, Stage] = {
    "quantile_merge": Stage(
        compress.quantile_merge,
        settings=compress.QuantileMerge,
        merges=compress.spreads,
        correlated=compress.spreads,
    ),
    "prune": Stage(compress.prune, correlated=False),
}

__all__ = ["COMPRESSIONS", "CORRELATIONS", "FILTERS", "Stage"]
