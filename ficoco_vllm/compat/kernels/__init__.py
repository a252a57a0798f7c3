"""Kernels of vLLM's model runner V2 without Triton, for machines without a GPU.

Triton's interpreter runs every operation of a kernel as Python, block by block, and cannot run all of them. Each
function here takes the arguments of the Triton kernel of the same name and writes the same results with numpy or torch.
The arguments that only shape the launch (block sizes, strides of contiguous tensors) are not read.
"""

from collections.abc import Callable

from ficoco_vllm.compat.kernels import batch, logits, noise, scores, thinking

# Module of model runner V2 to its Triton kernels, each with the function that replaces it.
_MODULES: dict[str, dict[str, Callable[..., None]]] = {
    "input_batch": {
        "_prepare_prefill_inputs_kernel": batch.prepare_prefill_inputs,
        "_prepare_pos_seq_lens_kernel": batch.prepare_pos_seq_lens,
        "_combine_sampled_and_draft_tokens_kernel": batch.combine_sampled_and_draft_tokens,
        "_get_num_sampled_and_rejected_kernel": batch.get_num_sampled_and_rejected,
        "_post_update_kernel": batch.post_update,
        "_post_update_num_computed_tokens_kernel": batch.post_update_num_computed_tokens,
        "_expand_idx_mapping_kernel": batch.expand_idx_mapping,
    },
    "mm.rope": {"_prepare_rope_positions_kernel": batch.prepare_rope_positions},
    "structured_outputs": {"_apply_grammar_bitmask_kernel": logits.apply_grammar_bitmask},
    "metrics.logits": {"_num_nans_kernel": logits.num_nans},
    "sample.logit_bias": {"_bias_kernel": logits.bias},
    "sample.penalties": {
        "_bincount_kernel": logits.bincount,
        "_penalties_kernel": logits.penalties,
    },
    "sample.bad_words": {"_bad_words_kernel": logits.bad_words},
    "sample.thinking_budget": {
        "_update_committed_marker_cache_kernel": thinking.update_cache,
        "_thinking_budget_kernel": thinking.thinking_budget,
    },
    "sample.gumbel": {
        "_temperature_kernel": logits.temperature,
        "_gumbel_sample_kernel": noise.gumbel_sample,
    },
    "sample.min_p": {"_min_p_kernel": logits.min_p},
    "sample.trace_replay": {"_trace_replay_kernel": scores.trace_replay},
    "sample.output": {"_compact_sampling_mask_kernel": scores.compact_sampling_mask},
    "sample.logprob": {
        "_topk_log_softmax_kernel": scores.topk_log_softmax,
        "_ranks_kernel": scores.ranks,
        "_fill_logprob_token_ids_kernel": scores.fill_logprob_token_ids,
    },
    "sample.prompt_logprob": {"_prompt_logprobs_token_ids_kernel": scores.prompt_logprobs_token_ids},
}
# The same by full name.
KERNELS = {
    f"vllm.v1.worker.gpu.{module}.{kernel}": function
    for module, kernels in _MODULES.items()
    for kernel, function in kernels.items()
}
