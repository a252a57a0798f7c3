"""Prompt length and per-request budget of LLaVA-NeXT, whose images are cut into tiles."""

from vllm.model_executor.models.llava_next import LlavaNextMultiModalProcessor, LlavaNextProcessingInfo

from ficoco_vllm.processing import ReducingInfo, ReducingProcessor


class FicocoNextProcessingInfo(ReducingInfo, LlavaNextProcessingInfo):
    """LLaVA-NeXT's processing facts, with the number of tokens that an image keeps by default."""


class FicocoNextProcessor(ReducingProcessor, LlavaNextMultiModalProcessor[FicocoNextProcessingInfo]):
    """LLaVA-NeXT's processor, with a budget per request."""

    info: FicocoNextProcessingInfo
