"""Offline inference with vLLM's `LLM` class: `python examples/offline.py [MODEL]`."""

import sys

from PIL import Image
from vllm import LLM, SamplingParams

from ficoco_vllm import demo_model

KEEP, KEEP_MORE = 64, 192


def main() -> None:
    """Answer one question at the engine's budget and at a larger one."""
    model = sys.argv[1] if len(sys.argv) > 1 else str(demo_model.path())
    example = demo_model.examples()[0]
    # The options below suit the demo model on a CPU; on a GPU leave all four out.
    llm = LLM(
        model,
        additional_config={"ficoco": {"method": "ficoco-v", "keep": KEEP}},
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        kv_cache_memory_bytes=2**28,
    )
    prompt = {
        "prompt": f"USER: <image>\n{example.question} ASSISTANT:",
        "multi_modal_data": {"image": Image.open(example.image)},
    }
    more = {**prompt, "mm_processor_kwargs": {"ficoco_keep": KEEP_MORE}}
    for output in llm.generate([prompt, more], SamplingParams(temperature=0, max_tokens=16)):
        print(output.outputs[0].text.strip(), len(output.prompt_token_ids or []), "prompt tokens")


if __name__ == "__main__":  # vLLM starts its engine in a new process, which imports this file
    main()
