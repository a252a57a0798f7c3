"""Request and response of `POST /ficoco/explain`."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ficoco_vllm.reduction.method import Site
from ficoco_vllm.tracing.chain import Departure, Step, destinations

# Number of targets listed for a removed token, the largest first; `rest` is the sum of the others.
MAX_TARGETS = 16
# Decimal places of shares and sizes.
_DIGITS = 5

Share = tuple[int, float]
# Left, top, width and height.
Box = tuple[float, float, float, float]


class ExplainRequest(BaseModel):
    """An image, a question, and the method and budget for its visual tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str = Field(min_length=1, description="URL of the image, as in a chat; usually a data URL")
    question: Annotated[str, StringConstraints(strip_whitespace=True)] = Field(
        min_length=1, max_length=4000, description="question about the image"
    )
    method: str | None = Field(
        default=None, max_length=64, description="reduction method (default: the server's)"
    )
    keep: int | None = Field(
        default=None, ge=1, strict=True, description="visual tokens kept (default: the server's)"
    )
    max_tokens: int = Field(
        default=64, ge=1, le=512, strict=True, description="limit of each of the two answers"
    )
    compare: bool = Field(default=True, strict=True, description="also answer without reduction")


class Measured(BaseModel):
    """One answer with its token counts, times and KV cache."""

    answer: str
    method: str | None = Field(description="reduction method; None: without reduction")
    visual_tokens: int = Field(description="visual tokens of the image that enter the decoder")
    last_visual_tokens: int = Field(description="visual tokens of the image in the decoder's last layer")
    prompt_tokens: int
    completion_tokens: int
    ttft_seconds: float = Field(
        description="time from the request to its first token; the image is in no cache"
    )
    total_seconds: float
    kv_bytes: int = Field(description="KV cache of the prompt, over all layers and workers")


class Left(BaseModel):
    """A removed token, and the tokens that took over its information."""

    token: int
    targets: list[Share] = Field(description="token and share, the largest first")
    rest: float = Field(description="share of targets that are not listed")
    lost: float = Field(description="share that no token took over")

    @classmethod
    def of(cls, departure: Departure) -> "Left":
        """List the largest targets."""
        named = [(token, round(share, _DIGITS)) for token, share in departure.targets[:MAX_TARGETS]]
        rest = sum(share for _, share in departure.targets[MAX_TARGETS:])
        return cls(
            token=departure.token,
            targets=named,
            rest=round(rest, _DIGITS),
            lost=round(departure.lost, _DIGITS),
        )


class Layer(BaseModel):
    """One reduction in one layer."""

    site: Site
    layer: int = Field(description="index, from 0")
    kept: list[int]
    num_fused: int = Field(description="number of new tokens, the last ones of `kept`")
    left: list[Left]
    sizes: list[float] = Field(description="number of patches that each token of `kept` represents")

    @classmethod
    def of(cls, step: Step) -> "Layer":
        """Convert one step of a trace."""
        return cls(
            site=step.site,
            layer=step.layer,
            kept=list(step.kept),
            num_fused=step.num_fused,
            left=[Left.of(departure) for departure in step.left],
            sizes=[round(size, _DIGITS) for size in step.sizes],
        )


class View(BaseModel):
    """Part of the image that the vision tower sees alone, without its padding."""

    first: int = Field(description="number of its first token; the others follow row by row")
    grid: tuple[int, int] = Field(description="rows and columns of patches")
    box: Box = Field(description="left, top, width and height in the image, whose own width and height are 1")
    tile: tuple[int, int] | None = Field(
        description="row and column of a tile, from 0; None: the view of the whole image"
    )


class Explanation(BaseModel):
    """Both answers, and the path of every patch.

    Patches are numbered view by view, row by row. Tokens without a patch (fused ones, newlines, [CLS]) have the numbers
    after those.
    """

    model: str
    question: str
    method: str
    keep: int
    views: list[View] = Field(
        description="one, or the tiles of an image and its whole view, in the order of their tokens"
    )
    grid: tuple[int, int] = Field(description="rows and columns of patches of the first view")
    central_square: float | None = Field(
        description="the grid covers the central square of the image; side of that square as a multiple of the "
        "image's shorter side; None: the whole image, stretched"
    )
    reduced: Measured
    full: Measured | None
    layers: list[Layer]
    destinations: list[Left] = Field(
        description="final location of the information of each removed token, over all layers"
    )

    @staticmethod
    def summarize(steps: Sequence[Step]) -> tuple[list[Layer], list[Left]]:
        """Convert a trace to `layers` and `destinations`."""
        return [Layer.of(step) for step in steps], [Left.of(item) for item in destinations(steps)]


class MethodChoice(BaseModel):
    """A method that a request may name."""

    name: str
    title: str
    site: Site
    summary: str = Field(description="what it does, in one line")


class ExampleChoice(BaseModel):
    """An image of this server, with a question."""

    image: str = Field(description="address, relative to the page")
    question: str


class Options(BaseModel):
    """Model, methods and budgets, for the page."""

    model: str
    methods: list[MethodChoice]
    method: str
    keep: int | None = Field(description="the server's budget; None: it follows the size of each image")
    min_keep: int
    max_keep: int
    grid: tuple[int, int]
    keep_per: Literal["image", "tile"] = Field(description="what a budget counts")
    examples: list[ExampleChoice]
