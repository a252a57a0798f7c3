"""Where the current budget goes: to the vision tower, to the decoder, or to both."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.decoder import KEEP, METHOD, DecoderPlanner
from ficoco_vllm.planning.tower import VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.server.elastic.settings import OPTION, ElasticSettings

if TYPE_CHECKING:  # it imports vLLM, which the command line sets the environment for first
    from ficoco_vllm.server.elastic.budget import ElasticBudget


@dataclass(frozen=True)
class Sites:
    """What one server does with a budget.

    Attributes:
        config: the server's settings.
        tower: plans of the tower.
        decoder: plans of the decoder, if the method works there.
    """

    config: FicocoConfig
    tower: VisionPlanner
    decoder: DecoderPlanner | None

    @classmethod
    def of(cls, config: FicocoConfig, hf_config: Any) -> "Sites":
        """The sites of a model.

        Args:
            config: the server's settings.
            hf_config: transformers' configuration of the model.

        Raises:
            ValueError: the settings do not fit the model.
        """
        tower = VisionPlanner.shared(config, TowerShape.from_hf_config(hf_config))
        if config.decoder_method is None:
            return cls(config, tower, None)
        num_layers = hf_config.get_text_config().num_hidden_layers
        return cls(
            config,
            tower,
            DecoderPlanner.shared(
                config, num_layers, tower.num_output_tokens(tower.default), tower.decoder_most
            ),
        )

    @property
    def most(self) -> int:
        """The largest budget: all visual tokens of an image, or of a tile where the tower counts these alone."""
        if self.decoder is None or self.tower.shape.tiling is None:
            return self.tower.most_keep
        return self.tower.num_input_tokens

    @property
    def tower_follows(self) -> bool:
        """Whether the tower's budget follows the load; of a method that reduces twice the operator may fix it."""
        return self.tower.active and "keep" not in self.config.encoder

    def tower_keep(self, budget: int) -> int:
        """Visual tokens of an image behind the tower, for a budget of the whole."""
        if self.config.method not in PIPELINES:
            return budget
        num_patches = self.tower.shape.num_patches
        return self.config.model_copy(update={"keep": budget}).tower_part(num_patches).keep or num_patches

    def plan(self, budget: int) -> None:
        """Plan one budget of the server's own method at all sites.

        Raises:
            ValueError: a method's schedule cannot reach it.
        """
        entering = self.tower.num_output_tokens(self.tower.default)
        if self.tower_follows:
            tower_budget = self.tower.budget(None, self.tower_keep(budget))
            entering = self.tower.num_output_tokens(tower_budget)
        if self.decoder is not None:
            # Where the tower leaves fewer than the budget they all stay.
            self.decoder.plan(entering + 1, [(0, entering)], {KEEP: min(budget, entering)})


def check_elastic(settings: ElasticSettings, config: FicocoConfig, hf_config: Any, min_keep: int = 1) -> None:
    """Hold settings against model, method and operator, before anything is loaded.

    Args:
        settings: of the controller.
        config: the server's settings.
        hf_config: transformers' configuration of the model.
        min_keep: the fewest visual tokens that the operator lets a request have.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    if config.kv_budget is not None:
        raise ValueError(
            f"kv_budget = {config.kv_budget} is not allowed with {OPTION}, which says what is left in the "
            "last layers; allowed: keep, or neither"
        )
    shape = TowerShape.from_hf_config(hf_config)
    most = shape.num_patches if shape.tiling is None else Sites.of(config, hf_config).most
    settings.check_bounds(min_keep, most)
    # The ceiling is the easiest to reach, so that of the others each is named where it cannot be.
    fixed = config.encoder.get("keep")
    most = settings.ceiling if fixed is None else min(settings.ceiling, fixed)
    at_ceiling = Sites.of(config.model_copy(update={"keep": most}), hf_config)
    settings.check_served(at_ceiling.plan)


@dataclass(frozen=True)
class TowerBudget:
    """Visual tokens behind the tower of a request that names none."""

    budget: "ElasticBudget"
    sites: Sites

    def __call__(self, method: str | None) -> int:
        """Visual tokens of an image.

        Args:
            method: that the request names, or None.
        """
        if method is None:
            return self.sites.tower_keep(self.budget())
        tower = self.sites.tower
        return self.sites.tower_keep(
            self.budget.reachable(lambda budget: tower.budget(method, self.sites.tower_keep(budget)))
        )


@dataclass(frozen=True)
class DecoderBudget:
    """Visual tokens in the decoder's last segment of a request that names none."""

    budget: "ElasticBudget"
    sites: Sites

    @cached_property
    def _of_tower(self) -> dict[int, int]:
        """From the tokens that the tower leaves to the budget of the whole that they were chosen for."""
        if not self.sites.tower_follows:
            return {}
        return {self.sites.tower_keep(budget): budget for budget in self.budget.settings.budgets}

    def __call__(self, method: str | None, entering: int) -> int:
        """Visual tokens of each image.

        Args:
            method: that the request names, or None.
            entering: visual tokens of its largest image that enter the decoder. Where they show the budget that the
                tower was given a moment ago, the decoder takes the same.
        """
        decoder = self.sites.decoder
        assert decoder is not None
        budget = self._of_tower.get(entering, self.budget())
        if method is None:
            return min(budget, entering)
        images = [(0, entering)]
        return min(
            self.budget.reachable(
                lambda level: decoder.plan(entering + 1, images, {KEEP: min(level, entering), METHOD: method})
            ),
            entering,
        )
