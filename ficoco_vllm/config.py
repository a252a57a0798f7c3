"""The settings of the server, and their validation."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ficoco_vllm.environment import NAME as NAME
from ficoco_vllm.kernels.backend import Backend
from ficoco_vllm.reduction import Method, get
from ficoco_vllm.reduction.control import CONTROLS
from ficoco_vllm.reduction.pipeline import PIPELINES, Pipeline
from ficoco_vllm.reduction.registry import names

# Method of a server with a budget and no method; docs/serving.md has the reasons.
DEFAULT_METHOD = "divprune"
# Method of settings that name hyperparameters but no method.
SETTINGS_METHOD = "ficoco-v"
# Share of an image's tokens where the grid follows the image's size and no budget is given.
DEFAULT_RATIO = 1 / 9


def default_keep(num_tokens: int) -> int:
    """The budget without `keep`: a ninth of the tokens, the paper's smallest (64 of 576)."""
    return max(1, round(num_tokens / 9))


class FicocoConfig(BaseModel):
    """Settings of the server: `additional_config["ficoco"]` of vLLM.

    Attributes:
        method: name of a method of the registry, or of one that reduces twice; None means no reduction, as in stock
            vLLM.
        keep: visual tokens of an image after the reduction where the request names no budget; None means a ninth of
            the patches.
        keep_ratio: instead of `keep`: a share of the visual tokens of each image, or of each tile.
        keep_per: unit of `keep` for a method of the tower that cuts images into tiles (LLaVA-NeXT): the tokens
            of each tile, or those of the image, which its tiles share.
        settings: hyperparameters of the method, by name; of one that reduces twice, those of its decoder part.
        kv_budget: for methods of the decoder, instead of `keep`: visual tokens of an image in the KV cache,
            averaged over the layers.
        num_segments: for methods of the decoder: runs of layers with a KV length of their own; None chooses the
            number that fits the method's layers.
        windows: for methods of the decoder: which part of a prompt decides what leaves an image, and with it what may
            be reused. "turn": the text up to the end of the user's turn that asks about the image, so that later turns
            find it in the prefix cache; "prompt": the whole prompt, so that only text before the first image is
            reused; "off": the whole prompt, without prefix caching and chunked prefill. None leaves the choice to the
            server when it starts; see `default_windows`.
        window_tokens: for `windows` "turn": the most tokens from an image to the end of its turn, which one step
            computes; None allows what `max_num_batched_tokens` holds.
        rounding: images in the decoder lose multiples of this many tokens. A server sets it: the block size where
            whole windows are cached, else 1.
        encoder: for a method that reduces twice: `keep` or `keep_ratio` and settings of its part in the tower.
        text_encoder: for methods that compare the image with the question: folder or name of the CLIP from which the
            model's vision tower came; its text encoder reads the question. None compares the language model's own
            embeddings.
        backend: implementation of the fused ops: "triton", "torch", or "auto": Triton on a GPU and torch elsewhere. A
            named implementation never falls back to another.
        graph_budgets: budgets whose tower is captured as CUDA graphs in addition to the default budget's, where
            vLLM's `cudagraph_mm_encoder` is on.
        metrics: whether `/metrics` reports the reduction's savings and costs.
        explain: whether a request may request a trace of its reduction, for the viewer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str | None = None
    keep: int | None = Field(default=None, ge=1, strict=True)
    keep_ratio: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    keep_per: Literal["tile", "image"] = "tile"
    settings: dict[str, Any] = Field(default_factory=dict)
    kv_budget: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    num_segments: int | None = Field(default=None, ge=2, strict=True)
    windows: Literal["off", "prompt", "turn"] | None = None
    window_tokens: int | None = Field(default=None, ge=1, strict=True)
    rounding: int = Field(default=1, ge=1, strict=True)
    encoder: dict[str, Any] = Field(default_factory=dict)
    text_encoder: str | None = Field(default=None, min_length=1)
    backend: Backend = "auto"
    graph_budgets: tuple[Annotated[int, Field(ge=1, strict=True)], ...] = ()
    metrics: bool = Field(default=True, strict=True)
    explain: bool = Field(default=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _gather_settings(cls, values: Any) -> Any:
        """Move top-level hyperparameters into `settings`, and fill in the method."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{NAME} = {values!r} is not a mapping of settings")
        fields = {key: value for key, value in values.items() if key in cls.model_fields}
        loose = {key: value for key, value in values.items() if key not in cls.model_fields}
        if loose:
            fields["settings"] = {**fields.get("settings", {}), **loose}
        general = (
            "text_encoder",
            "backend",
            "graph_budgets",
            "metrics",
            "explain",
            "keep_per",
            "windows",
            "rounding",
        )
        about_method = [value for key, value in fields.items() if key not in general]
        if any(value not in (None, {}) for value in about_method) and fields.get("method") is None:
            fields["method"] = SETTINGS_METHOD if fields.get("settings") else DEFAULT_METHOD
        return fields

    @model_validator(mode="after")
    def _check_method(self) -> "FicocoConfig":
        if self.method is None:
            if self.explain:
                raise ValueError(
                    "explain = True is not allowed without a method: there is nothing to explain"
                )
            self._check_without_method()
            return self
        pipeline = PIPELINES.get(self.method)
        if self.method not in names():
            raise ValueError(f"method = {self.method!r} is not a known method; allowed: {', '.join(names())}")
        if self.keep_ratio is not None and (self.keep is not None or self.decoder_method is not None):
            other = f"keep = {self.keep}" if self.keep is not None else f"the decoder's method {self.method}"
            raise ValueError(
                f"keep_ratio = {self.keep_ratio} together with {other} is not allowed; allowed: alone, for methods of "
                "the tower"
            )
        if self.method in CONTROLS:
            if self.explain:
                raise ValueError(
                    f"explain = True is not allowed with {self.method}: there is no reduction to explain"
                )
            if self.settings:
                raise ValueError(f"{min(self.settings)}: {self.method} has no settings; allowed: none")
        elif pipeline is None:
            get(self.method).configure(**self.settings)
        else:
            pipeline.decoder.configure(**self.settings)
            FicocoConfig.model_validate({**self.encoder, "method": pipeline.encoder.name})
        self._check_decoder_fields()
        return self

    def _check_without_method(self) -> None:
        """Refuse settings of a method where none is set."""
        unused = {
            "windows": self.windows not in (None, "off"),
            "rounding": self.rounding != 1,
            "keep_per": self.keep_per != "tile",
            "graph_budgets": bool(self.graph_budgets),
            "text_encoder": self.text_encoder is not None,
        }
        for name, is_set in unused.items():
            if is_set:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r} is not allowed without a method; allowed: with a method"
                )

    def _check_decoder_fields(self) -> None:
        if self.encoder and self.method not in PIPELINES:
            raise ValueError(f"encoder = {self.encoder!r} is allowed for {', '.join(PIPELINES)} only")
        if self.keep_per == "image" and self.decoder_method is not None:
            raise ValueError(
                f"keep_per = {self.keep_per!r} is for the tower; {self.method} counts the tokens of an image"
                + (", allowed: within encoder" if self.method in PIPELINES else ", allowed: 'tile'")
            )
        for name in ("kv_budget", "num_segments"):
            if getattr(self, name) is not None and self.decoder_method is None:
                raise ValueError(f"{name} is allowed for methods of the decoder only, not for {self.method}")
        if (self.windows or "off", self.rounding) != ("off", 1) and self.decoder_method is None:
            raise ValueError(
                f"windows = {self.windows!r} and rounding = {self.rounding} are for methods of the decoder; allowed: "
                "'off' and 1"
            )
        if self.text_encoder is not None and self.decoder_method is not None:
            raise ValueError(
                f"text_encoder = {self.text_encoder!r} is allowed for methods of the tower only, not for {self.method}"
            )
        if self.window_tokens is not None and self.decoder_method is None:
            raise ValueError(
                f"window_tokens = {self.window_tokens} is allowed for methods of the decoder only, "
                f"not for {self.method}"
            )
        outside_tower = self.method in CONTROLS or self.decoder_method is not None
        if self.graph_budgets and outside_tower and self.method not in PIPELINES:
            raise ValueError(
                f"graph_budgets = {self.graph_budgets!r} is not allowed with {self.method}, which does not reduce in "
                "the vision tower; allowed: for methods of the tower, and for those that reduce twice"
            )
        if self.window_tokens is not None and self.windows not in (None, "turn"):
            raise ValueError(f"window_tokens = {self.window_tokens} is allowed with windows = 'turn' only")
        if self.kv_budget is not None and self.keep is not None:
            raise ValueError(f"kv_budget = {self.kv_budget} and keep = {self.keep}: only one is allowed")

    @property
    def decoder_method(self) -> Method | None:
        """The method that reduces in the decoder, or None."""
        if self.method is None or self.method in CONTROLS:
            return None
        if self.method in PIPELINES:
            return PIPELINES[self.method].decoder
        method = get(self.method)
        return method if method.site == "decoder" else None

    @property
    def fixes_tower(self) -> bool:
        """Whether `encoder` gives the tower a budget of its own, which requests do not change."""
        return not self.encoder.keys().isdisjoint(("keep", "keep_ratio"))

    def tower_part(self, num_patches: int, dynamic: bool = False) -> "FicocoConfig":
        """The vision tower's part of the settings.

        Args:
            num_patches: number of patches of an image, of the largest one where `dynamic`.
            dynamic: whether the number of patches follows the image's size, so that the tower's budget follows each
                image.
        """
        pipeline = PIPELINES.get(self.method or "")
        if pipeline is not None:
            keep = {} if self.fixes_tower else self._encoder_budget(pipeline, num_patches, dynamic)
            part = {"method": pipeline.encoder.name, "backend": self.backend}
            return FicocoConfig.model_validate({**keep, **self.encoder, **part})
        return FicocoConfig() if self.decoder_method is not None else self

    def _encoder_budget(self, pipeline: Pipeline, num_patches: int, dynamic: bool) -> dict[str, Any]:
        """The tower's budget of a method that reduces twice, where `encoder` names none; see `tower_part`."""
        if not dynamic:
            final = self.keep if self.keep is not None else default_keep(num_patches)
            return {"keep": pipeline.encoder_keep(num_patches, min(final, num_patches))}
        if self.keep is None:
            return {"keep_ratio": pipeline.encoder_share(DEFAULT_RATIO)}
        return {"keep": min(num_patches, pipeline.encoder_most(self.keep))}

    @classmethod
    def parse(cls, values: Any) -> "FicocoConfig":
        """Validate settings.

        Args:
            values: the mapping `additional_config["ficoco"]`.

        Raises:
            ValueError: naming each wrong field, its value and what is allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError("; ".join(_message(item) for item in error.errors())) from error

    @classmethod
    def of(cls, hf_config: Any) -> "FicocoConfig":
        """The settings that `FicocoModelConfig` has validated and stored on the model's configuration.

        Args:
            hf_config: transformers' configuration of the model.
        """
        return cls.model_validate(getattr(hf_config, NAME, {}))


def _message(item: Any) -> str:
    """One line for one pydantic error: field, value, what is allowed."""
    if item["type"] == "value_error":
        return f"{NAME}: {item['ctx']['error']}"
    path = ".".join(str(part) for part in item["loc"])
    return f"{NAME}.{path} = {item['input']!r} is not allowed: {item['msg']}"
