"""LLaVA models that keep the visual tokens a reduction method selects."""

# Architectures with reduction, and the classes that replace vLLM's; vLLM imports a class when it serves it.
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "ficoco_vllm.models.llava:FicocoLlava",
    "LlavaNextForConditionalGeneration": "ficoco_vllm.models.llava_next:FicocoLlavaNext",
}
