"""InternVL in OpenGVLab's own format, each tile's visual tokens reduced in the tower; replaces vLLM's class."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from transformers import BatchFeature
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.intern_vit import InternVisionEncoderLayer, InternVisionModel
from vllm.model_executor.models.internvl import (
    InternVLChatModel,
    InternVLDummyInputsBuilder,
    InternVLMultiModalProcessor,
    InternVLProcessingInfo,
)
from vllm.multimodal.processing import PromptUpdateDetails

from ficoco_vllm.compat.versions import internvl_chat_processors
from ficoco_vllm.models.internvl import ReducingInternVL, in_units
from ficoco_vllm.planning.families.internvl import SIDE_OF_UNIT
from ficoco_vllm.processing import ReducingInfo, ReducingProcessor, register
from ficoco_vllm.vision.cpu_attention import is_faster
from ficoco_vllm.vision.cpu_layer import in_parts
from ficoco_vllm.vision.tower import Tower


@dataclass(frozen=True)
class ChatLayer:
    """One encoder layer (`EncoderLayer`).

    Attributes:
        layer: vLLM's.
    """

    layer: InternVisionEncoderLayer

    @property
    def scale(self) -> float:
        """See `EncoderLayer`."""
        return float(self.layer.attn.scale)

    @property
    def num_heads(self) -> int:
        """See `EncoderLayer`."""
        return int(self.layer.attn.num_heads)

    @property
    def all_reduce(self) -> Callable[[Tensor], Tensor] | None:
        """See `EncoderLayer`."""
        return tensor_model_parallel_all_reduce if self.layer.attn.tp_size > 1 else None

    def whole(self, hidden: Tensor) -> Tensor:
        """See `EncoderLayer`; in vLLM's own code, unless ours is faster."""
        if is_faster(hidden):
            return in_parts(self, hidden)
        # vLLM's `__call__` may be compiled (`compile_mm_encoder`), for one number of tokens.
        output: Tensor = self.layer.forward(hidden)
        return output

    def heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `EncoderLayer`; the heads of this rank."""
        attention = self.layer.attn
        qkv, _ = attention.qkv(self.layer.norm1(hidden))
        query, key, value = qkv.chunk(3, dim=-1)
        if attention.qk_normalization:
            query, key = attention._apply_qk_norm(query, key)
        B, N, _ = hidden.shape
        H, d = attention.num_heads_per_partition, attention.head_dim
        return cast(
            tuple[Tensor, Tensor, Tensor],
            tuple(part.reshape(B, N, H, d).transpose(1, 2) for part in (query, key, value)),
        )

    def project(self, mixed: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        projected: Tensor = self.layer.attn.proj(mixed)[0] * self.layer.ls1
        return projected

    def mlp(self, hidden: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        output: Tensor = self.layer.mlp(self.layer.norm2(hidden)) * self.layer.ls2
        return output


class ChatTower(Tower):
    """InternViT without a norm after its last layer (`Tower`), its patches unit by unit."""

    unit = SIDE_OF_UNIT**2

    def __init__(self, tower: InternVisionModel, grid: tuple[int, int]) -> None:
        """Share the modules of a tower.

        Args:
            tower: vLLM's.
            grid: rows and columns of units.
        """
        self.tower, self.grid = tower, grid
        self.layers = [ChatLayer(layer) for layer in tower.encoder.layers]

    def embed(self, pixels: Tensor) -> Tensor:
        """See `Tower`."""
        return in_units(self.tower.embeddings(pixels), self.grid)


class ChatProcessingInfo(ReducingInfo, InternVLProcessingInfo):
    """InternVL's processing info, with the number of tokens that an image keeps."""

    def get_video_processor(self, **kwargs: object) -> Any:
        """The processor of videos, which takes no settings of images; vLLM's own class hands it those, too.

        Args:
            **kwargs: `mm_processor_kwargs` of a request.
        """
        _, video_processor, _ = internvl_chat_processors()
        return video_processor(image_size=self.get_hf_config().vision_config.image_size)


class ChatProcessor(ReducingProcessor, InternVLMultiModalProcessor):
    """InternVL's processor, with a budget for each request."""

    info: ChatProcessingInfo

    def num_images(self, processed: BatchFeature) -> int:
        """See `ReducingProcessor`."""
        return len(processed.get("image_num_patches", ()))

    def placeholder(self, num_tokens: int) -> PromptUpdateDetails:
        """See `ReducingProcessor`."""
        processor = self.info.get_hf_processor()
        image = processor.ctx_image_token_id
        tokens = [processor.start_image_token_id, *[image] * num_tokens, processor.end_image_token_id]
        return PromptUpdateDetails.select_token_id(tokens, image)

    def _text_of(self, prompt: Sequence[int]) -> str:
        # In this format the place of an image is a text, not a token.
        text = str(self.info.get_tokenizer().decode(prompt, skip_special_tokens=True))
        return text.replace("<image>", "")


@register(
    ChatProcessingInfo,
    ChatProcessor,
    InternVLProcessingInfo,
    InternVLMultiModalProcessor,
    InternVLDummyInputsBuilder,
)
class FicocoInternVLChat(ReducingInternVL, InternVLChatModel):
    """vLLM's InternVL, with reduction of the images whose budget is below their number of tokens. Videos stay whole."""

    vision_model: Any
    mlp1: Any

    def tower_of(self, grid: tuple[int, int]) -> Tower:
        """See `ReducingModel`."""
        return ChatTower(self.vision_model, grid)

    def project(self, units: Tensor) -> Tensor:
        """See `ReducingModel`."""
        projected: Tensor = self.mlp1(units)
        return projected

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Embed the images or the videos of a step; see `embed_flat`.

        Args:
            **kwargs: vLLM's fields and ours.
        """
        return self.embed_flat(kwargs, "pixel_values_flat", super().embed_multimodal)
