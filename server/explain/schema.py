"""What `POST /ficoco/explain` is asked and answers."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ficoco_vllm.reduction.method import Site
from ficoco_vllm.tracing.chain import Departure, Step, destinations

# Of a token that left, so many targets are named, the largest; the sum of the others is `rest`.
MAX_TARGETS = 16
# Digits behind the point, of shares and sizes.
_DIGITS = 5

Share = tuple[int, float]


class ExplainRequest(BaseModel):
    """An image, a question, and how its visual tokens are to be reduced."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str = Field(
        min_length=1, description="URL of the image, as a chat may name it; usually a data URL"
    )
    question: Annotated[str, StringConstraints(strip_whitespace=True)] = Field(
        min_length=1, max_length=4000, description="what is asked about the image"
    )
    method: str | None = Field(default=None, max_length=64, description="without it, the server's")
    keep: int | None = Field(
        default=None, ge=1, strict=True, description="visual tokens that are kept; without it, the server's"
    )
    max_tokens: int = Field(default=64, ge=1, le=512, strict=True, description="of each of the two answers")
    compare: bool = Field(default=True, strict=True, description="ask without reduction too")


class Measured(BaseModel):
    """One answer, and what it took."""

    answer: str
    method: str | None = Field(description="None: without reduction")
    visual_tokens: int = Field(description="of the image, as it enters the decoder")
    last_visual_tokens: int = Field(description="of the image, in the decoder's last layer")
    prompt_tokens: int
    completion_tokens: int
    ttft_seconds: float = Field(
        description="from the request to its first token; no cache had seen the image"
    )
    total_seconds: float
    kv_bytes: int = Field(description="KV cache of the prompt, over all layers and workers")


class Left(BaseModel):
    """A token that left, and where its information went."""

    token: int
    targets: list[Share] = Field(description="token and share, the largest first")
    rest: float = Field(description="share that went to targets which are not named")
    lost: float = Field(description="share that went nowhere")

    @classmethod
    def of(cls, departure: Departure) -> "Left":
        """Keep the largest targets."""
        named = [(token, round(share, _DIGITS)) for token, share in departure.targets[:MAX_TARGETS]]
        rest = sum(share for _, share in departure.targets[MAX_TARGETS:])
        return cls(
            token=departure.token,
            targets=named,
            rest=round(rest, _DIGITS),
            lost=round(departure.lost, _DIGITS),
        )


class Layer(BaseModel):
    """One reduction, as the engine did it."""

    site: Site
    layer: int = Field(description="index, from 0")
    kept: list[int]
    num_fused: int = Field(description="the last tokens of `kept` that are new")
    left: list[Left]
    sizes: list[float] = Field(description="patches that each of `kept` stands for")

    @classmethod
    def of(cls, step: Step) -> "Layer":
        """One step of a trace."""
        return cls(
            site=step.site,
            layer=step.layer,
            kept=list(step.kept),
            num_fused=step.num_fused,
            left=[Left.of(departure) for departure in step.left],
            sizes=[round(size, _DIGITS) for size in step.sizes],
        )


class Explanation(BaseModel):
    """Both answers, and the way of every patch.

    Tokens are named by their patch's index in the grid, row by row; those without a place in it (fused ones, [CLS])
    take the numbers behind.
    """

    model: str
    question: str
    method: str
    keep: int
    grid: tuple[int, int] = Field(description="rows and columns of patches")
    central_square: float | None = Field(
        description="the grid covers the central square of the image whose side is so many times the shorter side; "
        "None: all of the image, stretched"
    )
    reduced: Measured
    full: Measured | None
    layers: list[Layer]
    destinations: list[Left] = Field(
        description="where the information of each token that left is in the end, over all layers"
    )

    @staticmethod
    def story(steps: Sequence[Step]) -> tuple[list[Layer], list[Left]]:
        """`layers` and `destinations` of a trace."""
        return [Layer.of(step) for step in steps], [Left.of(item) for item in destinations(steps)]


class MethodChoice(BaseModel):
    """A method that a request may ask for."""

    name: str
    title: str
    site: Site


class Options(BaseModel):
    """What the page needs to know of the server before the first question."""

    model: str
    methods: list[MethodChoice]
    method: str
    keep: int
    min_keep: int
    max_keep: int
    grid: tuple[int, int]
