"""Reduction of visual tokens in Hugging Face's LLaVA and LLaVA-NeXT, without vLLM.

    from ficoco_vllm.hf import reduce_tokens

    with reduce_tokens(model, method="ficoco-v", keep=64):
        model.generate(**inputs)

Methods, plans and measured signals are those of the server, so that results agree.
"""

from ficoco_vllm.hf.counts import Reduction, TokenCounts
from ficoco_vllm.hf.reduce import apply, reduce_tokens, remove

__all__ = ["Reduction", "TokenCounts", "apply", "reduce_tokens", "remove"]
