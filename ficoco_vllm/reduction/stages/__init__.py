"""All stages by name. Any filter goes with any correlation and any compression."""

from collections.abc import Mapping

from ficoco_vllm.reduction.stages import (
    bipartite,
    compress,
    context,
    correlate,
    filter,
    fuse,
    greedy,
    neighbours,
    recycle,
    spatial,
    text_filter,
)
from ficoco_vllm.reduction.stages.stage import Stage

_RATERS = frozenset({"text_attention", "features", "text_features"})

FILTERS: Mapping[str, Stage] = {
    "local_task": Stage(filter.local_task, filter.local_task_signals, filter.LocalTask, fused=True),
    "local_text": Stage(
        text_filter.local_text, text_filter.local_text_signals, text_filter.LocalText, fused=True
    ),
    "cls_attention": Stage(filter.cls_attention, frozenset({"cls_attention"})),
    "received_attention": Stage(
        text_filter.received_attention, text_filter.received_signals, text_filter.Received
    ),
    "self_cross": Stage(text_filter.self_cross, frozenset({"visual_attention", "text_attention"})),
    "text_relevance": Stage(text_filter.text_relevance, frozenset({"text_relevance"}), text_filter.Relevance),
    "key_similarity": Stage(bipartite.key_similarity, frozenset({"keys"}), max_removed=bipartite.half),
    "informativity": Stage(
        bipartite.informativity,
        frozenset({"keys", "cls_attention"}),
        bipartite.Informativity,
        max_removed=bipartite.half,
    ),
    "random_order": Stage(spatial.random_order, settings=spatial.Seed),
    "outlier_then_even": Stage(spatial.outlier_then_even, frozenset({"cls_attention"}), sized=True),
    "one_per_cell": Stage(spatial.one_per_cell, sized=True),
    "dominant_contextual": Stage(
        context.dominant_contextual, frozenset({"cls_attention"}), context.Contextual, sized=True
    ),
    "max_min_distance": Stage(greedy.max_min_distance, frozenset({"features"}), sized=True),
    "conditional_dpp": Stage(
        greedy.conditional_dpp, frozenset({"features", "text_relevance"}), text_filter.Relevance, sized=True
    ),
    "rate_and_recycle": Stage(recycle.rate_and_recycle, _RATERS, recycle.Recycling, sized=True),
    "text_recovery": Stage(
        neighbours.text_recovery,
        frozenset({"cls_attention", "text_relevance"}),
        neighbours.Recovery,
        sized=True,
    ),
}

CORRELATIONS: Mapping[str, Stage] = {
    "none": Stage(correlate.none, partners=()),
    "attention": Stage(correlate.attention, frozenset({"visual_attention"})),
    "attention_via_text": Stage(correlate.attention_via_text, correlate.via_text_signals, correlate.ViaText),
    "cls_weight": Stage(correlate.cls_weight, frozenset({"cls_attention"})),
    "key_cosine": Stage(correlate.key_cosine, frozenset({"keys"}), signed=True),
    "bipartite_cosine": Stage(
        bipartite.bipartite_cosine,
        frozenset({"keys"}),
        partners=(bipartite.key_similarity, bipartite.informativity),
        signed=True,
    ),
    "same_cell": Stage(spatial.same_cell, partners=(spatial.one_per_cell,)),
    "contextual_cosine": Stage(
        context.contextual_cosine,
        frozenset({"keys", "cls_attention"}),
        context.Contextual,
        partners=(context.dominant_contextual,),
        signed=True,
    ),
    "neighbour_attention": Stage(
        neighbours.neighbour_attention, frozenset({"keys", "cls_attention"}), neighbours.Neighbours
    ),
    "recovery_attention": Stage(
        neighbours.recovery_attention,
        frozenset({"keys", "cls_attention", "text_relevance"}),
        neighbours.Recovery,
    ),
    "cluster_likeness": Stage(recycle.cluster_likeness, _RATERS, recycle.Recycling, partners=()),
}

COMPRESSIONS: Mapping[str, Stage] = {
    "quantile_merge": Stage(
        compress.quantile_merge,
        settings=compress.QuantileMerge,
        merges=compress.spreads,
        positive=True,
        correlated=compress.spreads,
        fused=True,
    ),
    "nearest_merge": Stage(fuse.nearest_merge, settings=fuse.NearestMerge, merges=True),
    "add": Stage(fuse.add),
    "fuse": Stage(fuse.fuse, num_extra=1, merges=True),
    "fuse_mean": Stage(fuse.fuse_mean, num_extra=1, merges=True, correlated=False),
    "prune": Stage(compress.prune, correlated=False),
}

__all__ = ["COMPRESSIONS", "CORRELATIONS", "FILTERS", "Stage"]
