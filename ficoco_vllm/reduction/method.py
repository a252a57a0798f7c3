"""What a method is: three stages, their settings, and where in the model it works."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ficoco_vllm.reduction.reducer import Reducer
from ficoco_vllm.reduction.settings import Settings, combine, parse
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS, Stage
from ficoco_vllm.reduction.stages.stage import all_but_one

__all__ = ["SITES", "STAGES", "Method", "Site", "all_but_one"]

Site = Literal["encoder", "features", "decoder"]

# Where a reduction can take place, and which signals a LLaVA can measure there; `WHY_ABSENT` says why not all.
SITES: Mapping[str, frozenset[str]] = {
    "encoder": frozenset({"visual_attention", "cls_attention", "keys", "features"}),
    "features": frozenset({"visual_attention", "cls_attention", "keys", "features"}),
    "decoder": frozenset({"visual_attention", "text_attention", "keys", "features", "text_features"}),
}
STAGES: Mapping[str, Mapping[str, Stage]] = {
    "filter": FILTERS,
    "correlate": CORRELATIONS,
    "compress": COMPRESSIONS,
}


@dataclass(frozen=True)
class Method:
    """A reduction method by name.

    Attributes:
        name: as users write it.
        title: as its authors write it.
        site: "encoder", between attention and MLP of the reducing encoder layers; "features", once, on the
            vision feature output, with the signals of the last executed encoder layer; "decoder", between
            attention and MLP of the reducing decoder layers.
        source: arXiv identifier.
        filter: first stage.
        correlate: second stage.
        compress: third stage.
        knobs: settings beyond those of the stages.
        settings: the model of all its settings, put together from those of the stages and `knobs`.
    """

    name: str
    title: str
    site: Site
    source: str
    filter: Stage
    correlate: Stage
    compress: Stage
    knobs: type[Settings] = Settings
    settings: type[Settings] = field(init=False)

    def __post_init__(self) -> None:
        stages = (self.filter.settings, self.correlate.settings, self.compress.settings)
        object.__setattr__(self, "settings", combine(f"Settings of {self.name}", self.knobs, *stages))

    @property
    def num_extra(self) -> int:
        """E, how many fused tokens one call appends (none where nothing is removed)."""
        return self.compress.num_extra

    @property
    def merges(self) -> bool:
        """Whether the sizes keep their sum under the default settings."""
        return self.configure().merges

    @property
    def default_schedule(self) -> str:
        """How removals are spread over the reducing layers unless the settings say otherwise."""
        known = self.settings.model_fields.get("schedule")
        return "one-shot" if known is None else str(known.default)

    def max_removed(self, num_tokens: int) -> int:
        """The most tokens that one call may remove out of so many."""
        return self.filter.max_removed(num_tokens)

    def required_signals(self, **settings: Any) -> frozenset[str]:
        """Names of the signals that must be given under these settings."""
        return self.configure(**settings).signals

    def configure(self, **settings: Any) -> Reducer:
        """Fix the settings, and exchange stages.

        Args:
            **settings: of the method. Besides them `filter`, `correlate` and `compress` each exchange a stage
                for another one by name, whose settings then take the place of the old one's.

        Returns:
            The method, ready to be called. Its `method` is this one, with the stages exchanged.

        Raises:
            ValueError: naming each wrong field, its value and what is allowed.
        """
        exchanged: dict[str, Any] = {
            kind: _stage(kind, settings.pop(kind)) for kind in STAGES if kind in settings
        }
        method = replace(self, **exchanged) if exchanged else self
        return Reducer(method, parse(method.settings, settings, self.name))


def _stage(kind: str, name: Any) -> Stage:
    known = STAGES[kind]
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{kind} = {name!r} is not allowed; allowed: {', '.join(sorted(known))}")
    return known[name]
