"""The variants of `bench accuracy`, by table and row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ficoco_vllm.benchmarks.accuracy.variants import FULL, NO_IMAGE, SITES, Variant, full, site_of
from ficoco_vllm.reduction import available, get
from ficoco_vllm.reduction.method import SITES as SIGNALS
from ficoco_vllm.reduction.pipeline import PIPELINES

# Tokens that are left by chance, beside the methods of every site.
CONTROL = "random"
# The budget of the paper's ablations and sensitivity analyses: 1.5 TFLOPs, 64 tokens.
SMALL = 64
# Types of question of the ablations: some are read from few patches, like TextVQA, others from many, like ScienceQA.
FEW_KINDS = ("number", "number_by_colour_2", "colour", "shape")

Settings = Mapping[str, Any]
# Row label to settings. Groups follow the rows of the paper's Tables 2 and 4.
_REDUNDANCIES: Mapping[str, Settings] = {
    "w/o local redundancy": {"local_redundancy": False},
    "w/o task redundancy": {"task_redundancy": False},
}
_COMPRESSIONS: Mapping[str, Settings] = {
    **{f"fixed K={k}": {"fixed_k": k} for k in range(3)},
    "average compression": {"average": True},
}
ABLATION_V: Mapping[str, Settings] = {
    "FiCoCo-V": {},
    **_REDUNDANCIES,
    "w/o local penalty": {"local_penalty": False},
    **_COMPRESSIONS,
}
ABLATION_L: Mapping[str, Settings] = {
    "FiCoCo-L": {},
    **_REDUNDANCIES,
    "w/o indirect correlation": {"indirect_correlation": False},
    "w/o direct correlation": {"direct_correlation": False},
    **_COMPRESSIONS,
}
# One stage exchanged for another one, the rest as it is.
EXCHANGE_V: Mapping[str, Sequence[str]] = {
    "filter": ("cls_attention", "random_order"),
    "correlate": ("key_cosine", "neighbour_attention"),
    "compress": ("nearest_merge", "add", "prune"),
}
EXCHANGE_L: Mapping[str, Sequence[str]] = {
    "filter": ("received_attention",),
    "correlate": ("attention",),
    "compress": ("nearest_merge", "prune"),
}
# Setting to its values; the paper's Figure 4 (lam, beta, gamma), Tables 6 and 7, and what it fixes without a table.
_EPSILONS = (0.998, 0.996, 0.994, 0.992)
SENSITIVITY_V: Mapping[str, Sequence[Any]] = {
    "lam": (0.05, 0.2, 0.35, 0.5, 0.65, 0.95),
    "epsilon": _EPSILONS,
    "coefficient": (1, 2, 3, 4),
    "window": ((2, 2), (3, 3), (4, 4)),
    "start_layer": (2, 3, 4, 5),
    "schedule": ("even", "geometric", "one-shot"),
    "attention": ("probs", "logits"),
    "proportional_attention": (False, True),
}
SENSITIVITY_L: Mapping[str, Sequence[Any]] = {
    "beta": (0.2, 0.4, 0.6, 0.8),
    "gamma": (0.2, 0.4, 0.6, 0.8),
    "epsilon": _EPSILONS,
    "schedule": ("even", "geometric", "one-shot"),
    "start_layer": (1, 3, 5),
    "attention": ("probs", "logits"),
}


@dataclass(frozen=True)
class Row:
    """A variant in a table."""

    table: str
    label: str
    variant: Variant
    kinds: tuple[str, ...]


def methods_of(sites: Sequence[str]) -> tuple[str, ...]:
    """Methods that servers of a LLaVA run at some sites, in the order of `SITES`, and the control.

    Raises:
        ValueError: there is no such site.
    """
    unknown = sorted(set(sites) - set(SITES))
    if unknown:
        raise ValueError(f"site = {unknown[0]!r} is not allowed; allowed: {', '.join(SITES)}")
    methods = [
        name
        for place, signals in SIGNALS.items()
        for name in available(place)
        if get(name).required_signals() <= signals and not name.startswith("bench-")
    ]
    methods = [name for name in (*methods, *sorted(PIPELINES)) if site_of(name) in sites]
    return tuple(dict.fromkeys((*methods, CONTROL)))


def rows(
    methods: Sequence[str], keeps: Sequence[int], tables: Sequence[str], kinds: Sequence[str]
) -> list[Row]:
    """All rows of some of `TABLES`: the comparison of methods at each budget, and tables that concern one of them.

    Raises:
        ValueError: there is no such table or method.
    """
    unknown = sorted(set(tables) - set(TABLES))
    if unknown:
        raise ValueError(f"table = {unknown[0]!r} is not known; allowed: {', '.join(TABLES)}")
    sites = {site_of(method) for method in methods}
    wanted: list[Row] = []
    if "methods" in tables:
        variants = [
            Variant(NO_IMAGE, "tower"),
            *(full(site) for site in SITES if site in sites and site != "both"),
            *(Variant(name, site_of(name), name, keep) for name in methods for keep in keeps),
        ]
        wanted = [Row("methods", variant.label, variant, tuple(kinds)) for variant in variants]
    few = tuple(kind for kind in FEW_KINDS if kind in kinds)
    for table, (method, choices) in _TABLES_OF_ONE.items():
        if table in tables and method in methods:
            site = site_of(method)
            wanted.append(Row(table, FULL, full(site), few))
            wanted += [
                Row(table, label, Variant(method, site, method, SMALL, _changed(method, settings)), few)
                for label, settings in choices.items()
            ]
    return wanted


def _changed(method: str, settings: Settings) -> Settings:
    """Settings without those that are the default, so that equal variants are measured once."""
    fields = get(method).settings.model_fields
    return {
        key: value for key, value in settings.items() if key not in fields or fields[key].default != value
    }


def _grid(values: Mapping[str, Sequence[Any]], sign: str) -> dict[str, Settings]:
    """Settings that differ from the defaults in one value, by row label."""
    return {
        f"{name}{sign}{'x'.join(map(str, value)) if isinstance(value, tuple) else value}": {name: value}
        for name, options in values.items()
        for value in options
    }


_TABLES_OF_ONE: Mapping[str, tuple[str, Mapping[str, Settings]]] = {
    "ablation-v": ("ficoco-v", ABLATION_V),
    "ablation-l": ("ficoco-l", ABLATION_L),
    "exchange-v": ("ficoco-v", {"none": {}, **_grid(EXCHANGE_V, " ")}),
    "exchange-l": ("ficoco-l", {"none": {}, **_grid(EXCHANGE_L, " ")}),
    "sensitivity-v": ("ficoco-v", _grid(SENSITIVITY_V, " = ")),
    "sensitivity-l": ("ficoco-l", _grid(SENSITIVITY_L, " = ")),
}
TABLES = ("methods", *_TABLES_OF_ONE)
