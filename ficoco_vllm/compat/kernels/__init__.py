"""Kernels of vLLM's model runner V2 without Triton, for machines without a GPU.

Triton's interpreter runs every operation of a kernel as Python, block by block, and cannot run all of them. Each
function here takes the arguments of the Triton kernel of the same name and writes the same results with numpy or torch.
The arguments that only shape the launch (block sizes, strides of contiguous tensors) are not read.
"""

from collections.abc import Callable

from ficoco_vllm.compat.kernels import batch, logits, noise, scores, thinking

_GPU = "vllm.v1.worker.gpu"

# Full name of the Triton kernel to the function that replaces it.
KERNELS: dict[str, Callable[..., None]] = {
    f"{_GPU}.input_batch._prepare_prefill_inputs_kernel": batch.prepare_prefill_inputs,
    f"{_GPU}.input_batch._prepare_pos_seq_lens_kernel": batch.prepare_pos_seq_lens,
    f"{_GPU}.input_batch._combine_sampled_and_draft_tokens_kernel": batch.combine_sampled_and_draft_tokens,
    f"{_GPU}.input_batch._get_num_sampled_and_rejected_kernel": batch.get_num_sampled_and_rejected,
    f"{_GPU}.input_batch._post_update_kernel": batch.post_update,
    f"{_GPU}.input_batch._post_update_num_computed_tokens_kernel": batch.post_update_num_computed_tokens,
    f"{_GPU}.input_batch._expand_idx_mapping_kernel": batch.expand_idx_mapping,
    f"{_GPU}.structured_outputs._apply_grammar_bitmask_kernel": logits.apply_grammar_bitmask,
    f"{_GPU}.metrics.logits._num_nans_kernel": logits.num_nans,
    f"{_GPU}.sample.logit_bias._bias_kernel": logits.bias,
    f"{_GPU}.sample.penalties._bincount_kernel": logits.bincount,
    f"{_GPU}.sample.penalties._penalties_kernel": logits.penalties,
    f"{_GPU}.sample.bad_words._bad_words_kernel": logits.bad_words,
    f"{_GPU}.sample.thinking_budget._update_committed_marker_cache_kernel": thinking.update_cache,
    f"{_GPU}.sample.thinking_budget._thinking_budget_kernel": thinking.thinking_budget,
    f"{_GPU}.sample.gumbel._temperature_kernel": logits.temperature,
    f"{_GPU}.sample.min_p._min_p_kernel": logits.min_p,
    f"{_GPU}.sample.gumbel._gumbel_sample_kernel": noise.gumbel_sample,
    f"{_GPU}.sample.trace_replay._trace_replay_kernel": scores.trace_replay,
    f"{_GPU}.sample.output._compact_sampling_mask_kernel": scores.compact_sampling_mask,
    f"{_GPU}.sample.logprob._topk_log_softmax_kernel": scores.topk_log_softmax,
    f"{_GPU}.sample.logprob._ranks_kernel": scores.ranks,
    f"{_GPU}.sample.logprob._fill_logprob_token_ids_kernel": scores.fill_logprob_token_ids,
    f"{_GPU}.sample.prompt_logprob._prompt_logprobs_token_ids_kernel": scores.prompt_logprobs_token_ids,
}
