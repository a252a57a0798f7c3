"""Plan of one server: token counts of its method and budgets in the vision tower, in the decoder, or in both."""

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.decoder import DecoderPlanner
from ficoco_vllm.planning.families import tower_shape
from ficoco_vllm.planning.tiles import Tile
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.reduction.control import CONTROLS
from ficoco_vllm.reduction.cost import ModelShape, TilePlan, TokenPlan
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.request_fields import KEEP


@dataclass(frozen=True, eq=False)
class ServerPlan:
    """All plans of one server: the only source of token counts, also for `ficoco-vllm plan`.

    Attributes:
        config: settings of the server.
        tower: planner of the vision tower.
        decoder: planner of the decoder, None unless the method works there.
        num_layers: number of layers of the decoder.
    """

    config: FicocoConfig
    tower: VisionPlanner
    decoder: DecoderPlanner | None
    num_layers: int

    @classmethod
    def of(cls, config: FicocoConfig, hf_config: Any) -> "ServerPlan":
        """The plan of a server that is about to start.

        Args:
            config: settings of the server.
            hf_config: transformers' configuration of the model.

        Raises:
            ValueError: the settings do not fit the model.
        """
        num_layers = hf_config.get_text_config().num_hidden_layers
        return _shared(config.model_dump_json(), tower_shape(hf_config), num_layers)

    @classmethod
    def served(cls, hf_config: Any) -> "ServerPlan":
        """The plan of a server that has started.

        Args:
            hf_config: transformers' configuration of the model, on which `FicocoModelConfig` has stored the settings.
        """
        return cls.of(FicocoConfig.of(hf_config), hf_config)

    @classmethod
    def for_model(cls, config: FicocoConfig, shape: ModelShape) -> "ServerPlan":
        """The plan of a server of a LLaVA-1.5 whose sizes the cost model has read.

        Args:
            config: settings of the server.
            shape: sizes of the model.

        Raises:
            ValueError: the settings do not fit the model.
        """
        tower = TowerShape.from_model_shape(shape)
        return _shared(config.model_dump_json(), tower, shape.decoder.num_layers)

    @property
    def most(self) -> int:
        """The largest budget: all visual tokens of an image, or of a tile where the tower counts these alone."""
        if self.decoder is None or self.tower.shape.tiling is None:
            return self.tower.most_keep
        return self.tower.num_input_tokens

    @property
    def num_segments(self) -> int:
        """Runs of decoder layers with a KV length of their own."""
        return 1 if self.decoder is None else self.decoder.segments.num_segments

    @property
    def tower_follows(self) -> bool:
        """Whether the tower's budget follows the request's; for a method that reduces twice the operator may fix it."""
        return self.tower.active and not self.config.fixes_tower

    def tower_keep(self, budget: int) -> int:
        """The most visual tokens of an image after the tower, for a budget of the whole model."""
        if self.config.method not in PIPELINES:
            return budget
        if self.config.fixes_tower:
            return self.tower.default.keep
        shape = self.tower.shape
        part = self.config.model_copy(update={"keep": budget}).tower_part(shape.num_units, shape.dynamic)
        assert part.keep is not None
        return part.keep

    def check_budget(self, budget: int) -> None:
        """Raise unless the server's own method can meet a budget at all sites.

        Raises:
            ValueError: a method's schedule cannot reach it.
        """
        entering = self.tower.num_output_tokens(self.tower.default)
        if self.tower_follows:
            tower_budget = self.tower.budget(None, self.tower_keep(budget))
            entering = self.tower.num_output_tokens(tower_budget)
        if self.decoder is not None:
            # If the tower leaves fewer tokens than the budget, all of them stay.
            self.decoder.plan(entering + 1, [(0, entering)], {KEEP: min(budget, entering)})

    def image_tokens(
        self,
        budget: Budget | None = None,
        counts: tuple[int, ...] | None = None,
        size: tuple[int, int] | None = None,
    ) -> TokenPlan:
        """Tokens of one image layer by layer, as the cost model counts them.

        Args:
            budget: budget of the tower, None for its default.
            counts: visual tokens in each segment of the decoder, or one number for all layers; None for the default.
            size: height and width in pixels, of an image in tiles.

        Raises:
            ValueError: a method's schedule cannot reach its budget.
        """
        return _image_tokens(self, budget or self.tower.default, counts, size)

    def unreduced(self, size: tuple[int, int] | None = None) -> TokenPlan:
        """Tokens of one image layer by layer without reduction.

        Args:
            size: height and width in pixels, of an image in tiles.
        """
        height, width = size or (0, 0)
        before = self.tower.num_before(height=height, width=width)
        return self.image_tokens(Budget(None, self.tower.most_keep), (before,), size)


def decoder_planner(hf_config: Any) -> DecoderPlanner:
    """The planner of a server whose method works in the decoder; see `ServerPlan.served`."""
    decoder = ServerPlan.served(hf_config).decoder
    assert decoder is not None
    return decoder


@cache
def _shared(config_json: str, shape: TowerShape, num_layers: int) -> ServerPlan:
    config = FicocoConfig.model_validate_json(config_json)
    tower = VisionPlanner.shared(config, shape)
    decoder = None
    if config.decoder_method is not None:
        entering = tower.num_output_tokens(tower.default)
        decoder = DecoderPlanner.shared(config, num_layers, entering, tower.decoder_most, shape.num_deepstack)
    return ServerPlan(config, tower, decoder, num_layers)


@lru_cache(maxsize=4096)
def _image_tokens(
    plan: ServerPlan, budget: Budget, counts: tuple[int, ...] | None, size: tuple[int, int] | None
) -> TokenPlan:
    tower, decoder = plan.tower, plan.decoder
    num_patches, num_layers = tower.shape.num_units, tower.shape.num_executed_layers
    if tower.shape.tiling is None:
        entering = projected = budget.keep
        encoder = (num_patches,) * (num_layers + 1)
        if tower.reduces(budget):
            encoder = tower.plan(budget).layer_counts(num_patches, num_layers)
        tiles = [TilePlan.of(num_patches, encoder, budget.keep)]
    else:
        assert size is not None
        layout = tower.layout(budget, *size)
        entering, projected, tiles = layout.num_tokens, 0, []
        whole = [Tile(place, place.crop.num_units) for place in tower.shape.tiling.places(*size)]
        for tile in layout.tiles if layout.reduces or budget.method in CONTROLS else whole:
            num_shown = tile.place.crop.num_units
            tile_plan = tower.tile_plan(budget, tile)
            encoder = (num_shown,) * (num_layers + 1)
            if tile_plan is not None:
                encoder = tile_plan.layer_counts(num_shown, num_layers)
            num_entering = num_patches if tower.shape.tiling.pads else num_shown
            tiles.append(TilePlan.of(num_entering, encoder, tile.keep))
            # Stock vLLM crops the padding after the projector.
            projected += tile.keep if layout.reduces else num_entering
    if counts is None:
        counts = (entering,)
        if decoder is not None:
            counts = decoder.counts(decoder.method, entering, decoder.keep_of(entering))
    size_of_segment = plan.num_layers // len(counts)
    layers = tuple(counts[layer // size_of_segment] for layer in range(plan.num_layers))
    return TokenPlan(tuple(tiles), projected, (*layers, layers[-1]))
