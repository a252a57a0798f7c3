"""Limits of model runner V2 on sampling parameters, checked before a request reaches the engine.

V2 keeps these parameters in tables of fixed size. Its worker raises an error for a request that does not fit, and an
error of a worker ends the engine.
"""

from typing import Any

import vllm.envs as envs
from vllm.exceptions import VLLMValidationError

_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1


def check_limits(params: Any, num_prompt_tokens: int) -> None:
    """Refuse what does not fit.

    Args:
        params: vLLM's sampling parameters of a request, completed by its front end.
        num_prompt_tokens: number of tokens of its prompt.

    Raises:
        VLLMValidationError: naming the field, its value and what is allowed (HTTP 400).
    """
    from vllm.v1.worker.gpu.sample import logit_bias as tables  # imports Triton, which V1 does not need

    stop_tokens = params.all_stop_token_ids if params.min_tokens else ()
    bad_tokens = sum(map(len, params.bad_words_token_ids or ()))
    sizes = {
        "allowed_token_ids": (
            len(params.allowed_token_ids or ()),
            tables.MAX_NUM_ALLOWED_TOKEN_IDS,
            "tokens",
        ),
        "logit_bias": (len(params.logit_bias or ()), tables.MAX_NUM_LOGIT_BIAS_TOKENS, "tokens"),
        "stop_token_ids": (len(stop_tokens), tables.MAX_NUM_STOP_TOKEN_IDS, "tokens where min_tokens is set"),
        "bad_words": (bad_tokens, envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS, "tokens in all words"),
    }
    for field, (size, most, unit) in sizes.items():
        if size > most:
            raise VLLMValidationError(
                f"{field} has {size} {unit}; allowed: at most {most}", parameter=field, value=size
            )
    for field in ("min_tokens", "max_tokens"):
        value = getattr(params, field) or 0
        if value > _INT32_MAX - num_prompt_tokens:
            raise VLLMValidationError(
                f"{field} = {value} is not allowed; allowed: at most {_INT32_MAX - num_prompt_tokens}",
                parameter=field,
                value=value,
            )
    if params.seed is not None and not -_INT64_MAX - 1 <= params.seed <= _INT64_MAX:
        raise VLLMValidationError(
            f"seed = {params.seed} is not allowed; allowed: an integer of 64 bits", parameter="seed"
        )
