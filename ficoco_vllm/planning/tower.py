"""Token removals of each vision tower layer for a budget: integers, no tensors."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache, partial
from typing import Any, NamedTuple

from ficoco_vllm.config import DEFAULT_RATIO, FicocoConfig, default_keep
from ficoco_vllm.kernels.backend import Backend
from ficoco_vllm.planning.resolution import Resolution
from ficoco_vllm.planning.tiles import Layout, Tile
from ficoco_vllm.planning.tiling import Place
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.reduction import Reducer, available, get
from ficoco_vllm.reduction.control import CONTROLS
from ficoco_vllm.reduction.method import SITES
from ficoco_vllm.reduction.schedule import default_start_layer, make_schedule, shallow_layer
from ficoco_vllm.request_fields import KEEP, KEEP_RATIO, METHOD, check_keep, check_keep_ratio

VISION_SITES = ("encoder", "features")


class Budget(NamedTuple):
    """The method that reduces an image, and the tokens that it keeps of the image or of each tile.

    Attributes:
        method: by name, None for none.
        keep: the most tokens.
        ratio: where the budget is a share of the units, that share; `keep` is then the share of the largest image.
    """

    method: str | None
    keep: int
    ratio: float | None = None

    def of(self, num_units: int) -> int:
        """Number of tokens that an image, or a tile, of `num_units` units keeps."""
        share = num_units if self.ratio is None else max(1, round(self.ratio * num_units))
        return min(self.keep, share, num_units)


@dataclass(frozen=True)
class VisionPlan:
    """Removals of the tower for one budget.

    Attributes:
        reducer: the method with its settings.
        keep: visual tokens at the end.
        removals: index of each reducing layer to the number of tokens removed there; empty for a method that
            works on the features.
        shallow_layer: index of the layer whose [CLS] attention the method reads in addition to the last one's, or None.
        proportional: whether later layers weigh each key by the units that it represents.
        logits: whether the method reads attention logits instead of probabilities.
        backend: which implementation of the fused ops runs.
    """

    reducer: Reducer
    keep: int
    removals: dict[int, int] = field(default_factory=dict)
    shallow_layer: int | None = None
    proportional: bool = False
    logits: bool = False
    backend: Backend = "auto"

    def layer_counts(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        """Visual tokens that enter each layer, and those that leave the last one.

        Args:
            num_tokens: units that enter the first layer.
            num_layers: executed layers of the tower.
        """
        counts = [num_tokens]
        for layer in range(num_layers):
            removed = self.removals.get(layer, 0)
            counts.append(counts[-1] - removed + (self.reducer.num_extra if removed else 0))
        return tuple(counts)


@dataclass(frozen=True, eq=False)
class VisionPlanner:
    """All plans of one tower under one configuration, the same in the processor and in the tower."""

    config: FicocoConfig
    shape: TowerShape

    @classmethod
    def shared(cls, config: FicocoConfig, shape: TowerShape) -> "VisionPlanner":
        """The cached planner of the tower's part of the settings, validated once.

        Raises:
            ValueError: the settings do not fit the tower.
        """
        _check_tiles(config, shape)
        return _shared(config.tower_part(shape.num_units, shape.dynamic).model_dump_json(), shape)

    @property
    def active(self) -> bool:
        """Whether a method reduces in the tower; if not, the tower is as in stock vLLM."""
        return self.config.method is not None

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """Methods that the vision tower can serve, in the order of their indices."""
        offered = [(name, SITES[site]) for site in VISION_SITES for name in available(site)]
        served = tuple(name for name, signals in offered if get(name).required_signals() <= signals)
        return (*served, *CONTROLS) if self.shape.dynamic else served

    def reads_question(self, method: str | None) -> bool:
        """Whether what stays of an image depends on the question about it.

        Args:
            method: by name; None, or a name that this tower does not serve, reads none.
        """
        if method is None or method in CONTROLS or method not in self.methods:
            return False
        return "text_relevance" in _reducer(self, method).signals

    @property
    def default(self) -> Budget:
        """The budget of a request that names none."""
        method, keep, ratio = self.config.method, self.config.keep, self.config.keep_ratio
        if not self.active:
            return Budget(None, self.most_keep)
        if keep is None and ratio is None and self.shape.dynamic:
            ratio = DEFAULT_RATIO
        if ratio is not None:
            return self._share(method, ratio)
        return Budget(method, default_keep(self.most_keep) if keep is None else keep)

    def _share(self, method: str | None, ratio: float) -> Budget:
        """The budget that keeps a share of the units; a number where all images have the same."""
        keep = max(1, round(ratio * self.most_keep))
        return Budget(method, keep, None if self.shape.tiling is None else ratio)

    @property
    def in_words(self) -> str:
        """The default budget, for logs."""
        method, keep, ratio = self.default
        part = "an image"
        if self.shape.tiling is not None and not self.shape.dynamic and self.config.keep_per == "tile":
            part = "each tile of an image"
        share = f"{keep} of {self.most_keep}" if ratio is None else f"{ratio:.1%} of the"
        return f"{method} keeps {share} visual tokens of {part}"

    @cached_property
    def fingerprint(self) -> str:
        """A short name of the settings, for the hashes of the caches."""
        text = json.dumps(
            self.config.model_dump(mode="json", exclude={"metrics", "explain", "graph_budgets"}),
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def most_keep(self) -> int:
        """The largest budget that a request may name."""
        tiling = self.shape.tiling
        if tiling is None or self.config.keep_per == "tile":
            return self.shape.num_units
        return self.shape.num_units * tiling.most_tiles

    @cached_property
    def num_input_tokens(self) -> int:
        """Placeholders of the largest image without reduction, as in stock vLLM."""
        tiling = self.shape.tiling
        if tiling is None:
            return self.shape.num_units + self.shape.with_cls
        return max(tiling.num_tokens(height, width) for height, width in tiling.sizes)

    @property
    def decoder_most(self) -> int:
        """A budget that requests may always name in the decoder, independent of the tower's default.

        An image in tiles may have any number of tokens, which its request does not know.
        """
        return 0 if self.shape.tiling is None else self.num_input_tokens

    def method_index(self, method: str | None) -> int:
        """Index of a method, which travels with an image to the workers."""
        return -1 if method is None else self.methods.index(method)

    def budget(self, method: Any, keep: Any, ratio: Any = None) -> Budget:
        """Validate the budget of a request.

        Args:
            method: the requested name, or None for the server's default.
            keep: the requested number of tokens, or None for the server's default.
            ratio: the requested share of the tokens, in place of `keep`.

        Raises:
            ValueError: starting with the field, then its value and what is allowed.
        """
        default = self.default
        if method is None and keep is None and ratio is None:
            return default
        if not self.active:
            name = KEEP if keep is not None else METHOD if ratio is None else KEEP_RATIO
            raise ValueError(
                f"{name}: this server does not reduce; start it with --ficoco-method to allow it"
            )
        if method is None:
            method = default.method
        elif method not in self.methods:
            raise ValueError(
                f"{METHOD} = {method!r} is not a method that this model can serve; "
                f"allowed: {', '.join(self.methods)}"
            )
        if ratio is not None and keep is not None:
            raise ValueError(
                f"{KEEP_RATIO} = {ratio!r} together with {KEEP} = {keep!r} is not allowed; allowed: one of them"
            )
        if ratio is not None:
            budget = self._share(method, check_keep_ratio(ratio))
        elif keep is None:
            budget = default._replace(method=method)
        else:
            budget = Budget(method, check_keep(keep, self.most_keep))
        try:
            self.check(budget)
        except ValueError as error:
            name = f"{KEEP} = {budget.keep}" if ratio is None else f"{KEEP_RATIO} = {ratio}"
            raise ValueError(f"{name}: {error}") from error
        return budget

    def reduces(self, budget: Budget) -> bool:
        """Whether the tower removes tokens; of the largest image where images are cut into tiles."""
        return budget.keep < self.most_keep

    def num_output_tokens(self, budget: Budget) -> int:
        """Placeholders of an image, of the largest one where images are cut into tiles.

        They are its kept units, and [CLS] where the model takes it.
        """
        tiling = self.shape.tiling
        if tiling is None:
            return budget.keep + self.shape.with_cls
        return max(self.layout(budget, height, width).num_tokens for height, width in tiling.sizes)

    def num_image_tokens(self, budget: Budget, *, height: int, width: int) -> int:
        """Placeholders of one image.

        Args:
            budget: budget of the image or of each tile.
            height: in pixels.
            width: in pixels.

        Raises:
            ValueError: the method's schedule cannot reach the budget in one of its tiles.
        """
        if self.shape.tiling is None:
            return self.num_output_tokens(budget)
        return self.layout(budget, height, width).num_tokens

    def num_before(self, *, height: int, width: int) -> int:
        """Visual tokens of one image without reduction, [CLS] not counted.

        Args:
            height: in pixels.
            width: in pixels.
        """
        tiling = self.shape.tiling
        return self.shape.num_units if tiling is None else tiling.num_tokens(height, width)

    def layout(self, budget: Budget, height: int, width: int) -> Layout:
        """Layout of an image in tiles under a budget.

        Args:
            budget: budget of each tile, or of the image where the settings say so.
            height: in pixels.
            width: in pixels.

        Raises:
            ValueError: the method's schedule cannot reach the budget in one of the tiles.
        """
        tiling = self.shape.tiling
        assert tiling is not None
        places = tiling.places(height, width)
        if budget.method in CONTROLS:  # the image is shrunk first
            assert isinstance(tiling, Resolution)
            places = tiling.place(*tiling.fit(height, width, budget.of(tiling.count(places))))
        return self.layout_of(budget, places)

    def layout_of(self, budget: Budget, places: tuple[Place, ...]) -> Layout:
        """Layout of an image whose tiles are known; see `layout`.

        Args:
            budget: budget of each tile, or of the image where the settings say so.
            places: places of its tiles.

        Raises:
            ValueError: the method's schedule cannot reach the budget in one of the tiles.
        """
        if budget.method in CONTROLS:
            budget = Budget(budget.method, self.most_keep)
        return _layout(self, budget, places)

    def tile_plan(self, budget: Budget, tile: Tile) -> VisionPlan | None:
        """Plan of a tile, None where only its padding leaves.

        Args:
            budget: budget of the image; only its method is read.
            tile: tile of the image.

        Raises:
            ValueError: the method's schedule cannot reach the tile's budget.
        """
        if tile.is_whole:
            return None
        grid = (tile.place.crop.rows, tile.place.crop.columns)
        planner = self if grid == self.shape.grid else _of_grid(self, grid)
        return planner.plan(Budget(budget.method, tile.keep))

    def check(self, budget: Budget) -> None:
        """Raise unless a budget can be met.

        Raises:
            ValueError: the method's schedule cannot reach it.
        """
        if budget.method in CONTROLS:
            return
        if self.shape.tiling is None:
            self.plan(budget)
        else:
            self.num_output_tokens(budget)

    def plan(self, budget: Budget) -> VisionPlan:
        """Plan for a budget.

        Raises:
            ValueError: the method's schedule cannot reach it.
        """
        return _plan(self, budget)


def _check_tiles(config: FicocoConfig, shape: TowerShape) -> None:
    """Refuse settings that have no meaning for an image in tiles.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    if shape.tiling is None:
        return
    if config.encoder.get("keep_per") == "image" and "keep" not in config.encoder:
        raise ValueError("ficoco.encoder.keep_per = 'image' is allowed with ficoco.encoder.keep only")
    schedule = config.tower_part(shape.num_units, shape.dynamic).settings.get("schedule")
    if schedule is not None and not isinstance(schedule, str):
        raise ValueError(
            f"ficoco.schedule = {schedule!r} is not allowed with images in tiles, whose numbers of tokens differ; "
            "allowed: a schedule by name"
        )


@lru_cache(maxsize=4096)
def _layout(planner: VisionPlanner, budget: Budget, places: tuple[Place, ...]) -> Layout:
    tiling = planner.shape.tiling
    assert tiling is not None
    layout = Layout.of(tiling, places, budget.of, planner.config.keep_per)
    for tile in layout.tiles if layout.reduces else ():
        planner.tile_plan(budget, tile)  # raises where the schedule cannot reach it
    return layout


@lru_cache(maxsize=1024)
def _of_grid(planner: VisionPlanner, grid: tuple[int, int]) -> VisionPlanner:
    """Plans of a tile in which `grid` rows and columns of units show the image; padding leaves first."""
    return VisionPlanner(planner.config, replace(planner.shape, grid=grid, tiling=None))


@lru_cache(maxsize=256)
def _reducer(planner: VisionPlanner, name: str) -> Reducer:
    """A method with its settings: the server's own has the server's, another one its defaults."""
    method, config = get(name), planner.config
    settings = config.settings if name == config.method else {}
    if "negate" in method.settings.model_fields and config.text_encoder is None:
        # A patch of CLIP is least similar to what it shows; the embeddings of a language model need no negation.
        settings = {"negate": False, **settings}
    return method.configure(**settings)


@lru_cache(maxsize=4096)
def _plan(planner: VisionPlanner, budget: Budget) -> VisionPlan:
    assert budget.method is not None
    config, shape = planner.config, planner.shape
    reducer = _reducer(planner, budget.method)
    method = reducer.method
    spread = partial(
        make_schedule,
        num_tokens=shape.num_units,
        keep=budget.keep,
        num_extra=reducer.num_extra,
        max_removed=reducer.max_removed,
    )
    if method.site == "features":
        spread("one-shot", layers=[0])
        shallow = None
        if "shallow_cls_attention" in reducer.signals and budget.keep < shape.num_units:
            shallow = min(shallow_layer(shape.num_layers), shape.num_executed_layers - 1)
        return VisionPlan(reducer, budget.keep, shallow_layer=shallow, backend=config.backend)
    start = getattr(reducer.settings, "start_layer", None)
    if start is None:
        start = default_start_layer(shape.num_layers)
    last = shape.num_executed_layers - 1
    if start > last:
        raise ValueError(f"start_layer = {start} is not allowed; allowed: an integer from 0 to {last}")
    schedule = getattr(reducer.settings, "schedule", method.default_schedule)
    return VisionPlan(
        reducer,
        budget.keep,
        removals=spread(schedule, layers=range(start, last + 1)),
        proportional=getattr(reducer.settings, "proportional_attention", False),
        logits=getattr(reducer.settings, "attention", "probs") == "logits",
        backend=config.backend,
    )


@cache
def _shared(config: str, shape: TowerShape) -> VisionPlanner:
    planner = VisionPlanner(FicocoConfig.model_validate_json(config), shape)
    if not planner.active:
        return planner
    assert planner.config.method is not None
    if planner.config.method in CONTROLS:
        if planner.config.method not in planner.methods:
            control = CONTROLS[planner.config.method]
            raise ValueError(
                f"ficoco.method = {control.name!r} is not allowed, since it needs {control.needs}; "
                f"allowed: {', '.join(planner.methods)}"
            )
        return planner
    method = get(planner.config.method)
    if method.site not in VISION_SITES:
        raise ValueError(
            f"ficoco.method = {method.name!r} works in the {method.site}, which is not served; "
            f"allowed: {', '.join(planner.methods)}"
        )
    method.configure(**planner.config.settings).check_signals(SITES[method.site])
    keep, most = planner.default.keep, planner.most_keep
    if keep > most:
        raise ValueError(f"ficoco.keep = {keep} is not allowed; allowed: an integer from 1 to {most}")
    planner.check(planner.default)
    return planner
