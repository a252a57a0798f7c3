"""Each function in place of a Triton kernel of vLLM's, against that kernel in Triton's interpreter.

vLLM's own launchers are called twice, with the kernel and with the function, on awkward sizes.
"""

import copy
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.interpreter, pytest.mark.compat]

if os.environ.get("TRITON_INTERPRET") == "1":
    from vllm.triton_utils import tl
    from vllm.triton_utils.dispatcher import KernelOverride
    from vllm.v1.worker.cpu import buffer_utils as cpu_buffer_utils
    from vllm.v1.worker.gpu import block_table, buffer_utils, input_batch, structured_outputs
    from vllm.v1.worker.gpu.metrics import logits as nans
    from vllm.v1.worker.gpu.mm import rope
    from vllm.v1.worker.gpu.sample import (
        bad_words,
        gumbel,
        logit_bias,
        logprob,
        min_p,
        output,
        penalties,
        prompt_logprob,
        thinking_budget,
        trace_replay,
    )

    from ficoco_vllm.compat.kernels import KERNELS, blocks

GPU = "vllm.v1.worker.gpu"
MAX_LEN = 40


@pytest.fixture(autouse=True)
def without_barriers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As vLLM's CPU worker runs interpreted kernels and keeps buffers; and masked values may overflow."""
    monkeypatch.setattr(tl, "debug_barrier", lambda: None)
    monkeypatch.setattr(buffer_utils, "UvaBuffer", cpu_buffer_utils.UvaBuffer)
    before = np.seterr(over="ignore", invalid="ignore", divide="ignore")
    yield
    np.seterr(**before)


class Step:
    """Inputs of a step with random requests: prompts, parts of prompts, and answers with drafts.

    Attributes:
        num_reqs: of the step; there are three more states.
        states: of the requests, (num_reqs,).
        drafts: number of drafts of each request.
        rows: of logits.
    """

    def __init__(self, num_reqs: int, seed: int, most_drafts: int = 2) -> None:
        rng = self.rng = np.random.default_rng(seed)
        self.num_reqs, self.num_states = num_reqs, num_reqs + 3
        self.states = torch.from_numpy(rng.permutation(self.num_states)[:num_reqs])
        self.drafts = rng.integers(0, most_drafts + 1, num_reqs)
        self.most_drafts = most_drafts
        self.prompt_len = self.ints(3, MAX_LEN // 2, self.num_states)
        self.prefill_len = self.prompt_len + self.ints(0, 4, self.num_states)
        answers = rng.random(self.num_states) < 0.6
        self.computed = torch.where(
            torch.from_numpy(answers), self.prefill_len + 2, self.prefill_len // 2
        ).int()
        left = (self.prefill_len - self.computed)[self.states].numpy()
        chunk = np.maximum(left - rng.integers(0, 2, num_reqs), 1)
        self.query_len = np.where(left <= 0, 1, chunk)
        self.drafts = np.where(left <= 0, self.drafts, 0)
        self.query_len = self.query_len + self.drafts
        self.starts = torch.from_numpy(np.concatenate([[0], np.cumsum(self.query_len)]).astype(np.int32))
        self.cu_num_logits = torch.from_numpy(
            np.concatenate([[0], np.cumsum(self.drafts + 1)]).astype(np.int32)
        )
        self.rows = int(self.cu_num_logits[-1])
        self.num_tokens = int(self.starts[-1])
        self.expanded = torch.from_numpy(np.repeat(self.states.numpy(), self.drafts + 1))
        self.local_pos = torch.cat([torch.arange(n + 1, dtype=torch.int32) for n in self.drafts])
        self.tokens = self.ints(0, 50, self.num_states, MAX_LEN)

    def ints(self, low: int, high: int, *shape: int, dtype: Any = np.int32) -> Tensor:
        return torch.from_numpy(self.rng.integers(low, high, shape).astype(dtype))

    def floats(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.normal(0, 3, shape).astype(np.float32))

    def logits(self, vocab_size: int) -> Tensor:
        """With tokens that are already forbidden, and equal ones."""
        values = self.floats(self.rows, vocab_size).round(decimals=1)
        values[:, self.ints(0, vocab_size, vocab_size // 7).long()] = -torch.inf
        return values

    @property
    def seq_lens(self) -> Tensor:
        return self.computed[self.states] + torch.from_numpy(self.query_len).int()

    @property
    def total_len(self) -> Tensor:
        return self.prefill_len + 3


Call = tuple[Callable[..., Any], list[Any]]


def prepare_prefill_inputs(step: Step, vocab: int) -> Call:
    return input_batch.prepare_prefill_inputs, [
        torch.zeros(step.num_tokens, dtype=torch.int32),
        step.ints(0, 9, 2, step.num_states),
        step.states,
        step.starts,
        step.tokens,
        step.prefill_len,
        step.computed,
    ]


def prepare_pos_seq_lens(step: Step, vocab: int) -> Call:
    buffers = [torch.full((step.num_tokens + 5,), 7), step.ints(1, 9, step.num_states)]
    return input_batch.prepare_pos_seq_lens, [step.states, step.starts, step.computed, *buffers]


def prepare_rope_positions(step: Step, vocab: int) -> Call:
    state = SimpleNamespace(
        num_dims=3,
        max_model_len=MAX_LEN,
        positions=torch.full((3, step.num_tokens + 1), 7),
        prefill_positions=SimpleNamespace(gpu=step.ints(0, 99, 3 * step.num_states, MAX_LEN)),
        prefill_delta=SimpleNamespace(gpu=step.ints(-9, 0, step.num_states)),
    )
    return rope.RopeState.prepare_positions, [
        state,
        step.states,
        step.starts,
        step.prefill_len,
        step.computed,
    ]


def combine(step: Step, vocab: int, num_new: int = 1) -> Call:
    return input_batch.combine_sampled_and_draft_tokens, [
        step.ints(0, 9, step.num_tokens),
        step.states,
        step.ints(10, 20, step.num_states, 1, dtype=np.int64),
        step.starts,
        step.seq_lens,
        step.prefill_len,
        step.ints(20, 30, step.num_states, step.most_drafts + 1 - num_new, dtype=np.int64),
        step.cu_num_logits,
        step.rows,
        num_new,
    ]


def num_sampled_and_rejected(step: Step, vocab: int) -> Call:
    sampled = torch.from_numpy(step.rng.integers(1, step.drafts + 2)).int()
    return input_batch.get_num_sampled_and_rejected, [
        sampled,
        step.seq_lens,
        step.cu_num_logits,
        step.states,
        step.prefill_len,
    ]


def post_update(step: Step, vocab: int, with_counts: bool = True) -> Call:
    num_sampled = torch.from_numpy(step.rng.integers(0, step.drafts + 2)).int()
    states = torch.where(step.ints(0, 4, step.num_reqs) == 0, -1, step.states)
    return input_batch.post_update, [
        states,
        step.computed,
        step.ints(0, 9, step.num_states, 1, dtype=np.int64),
        step.ints(0, 3, step.num_states, vocab) if with_counts else None,
        step.ints(0, vocab, step.num_reqs, step.most_drafts + 1, dtype=np.int64),
        num_sampled,
        torch.from_numpy(step.drafts).int() + 1 - num_sampled,
        step.starts if with_counts else None,
        step.tokens,
        step.total_len,
    ]


def post_update_computed(step: Step, vocab: int) -> Call:
    return input_batch.post_update_num_computed_tokens, [step.states, step.computed, step.starts]


def expand(step: Step, vocab: int) -> Call:
    arguments = [step.states, step.rows, step.cu_num_logits, step.most_drafts + 1]
    return input_batch.expand_idx_mapping, arguments


def bias(step: Step, vocab: int, restores: bool = False) -> Call:
    def ids(most: int) -> Tensor:
        """Different ones in each row."""
        return torch.stack([torch.randperm(vocab)[: min(most, vocab)] for _ in range(step.num_states)]).int()

    def counts() -> Tensor:
        return step.ints(0, min(5, vocab + 1), step.num_states)

    allowed, stops = ids(4), ids(4)
    if restores:  # only stop tokens are left in some rows
        stops = allowed.clone()
    num_allowed = counts()
    return logit_bias.apply_logit_bias, [
        step.logits(vocab),
        step.expanded,
        step.ints(0, 30, step.rows, dtype=np.int64),
        num_allowed,
        allowed,
        counts(),
        ids(4),
        step.floats(step.num_states, min(4, vocab)),
        step.ints(0, 30, step.num_states),
        num_allowed if restores else counts(),
        step.ints(0, 2, step.num_states),
        stops,
        restores,
    ]


def bincount(step: Step, vocab: int) -> Call:
    return penalties.bincount, [
        step.states,
        step.tokens % vocab,
        step.prompt_len,
        step.prefill_len,
        step.ints(0, 9, step.num_states, -(-vocab // 32)),
        step.ints(0, 9, step.num_states, vocab),
        int(step.prefill_len.max()),
    ]


def apply_penalties(step: Step, vocab: int) -> Call:
    def some(neutral: float) -> Tensor:
        return torch.where(step.ints(0, 2, step.num_states) == 0, neutral, step.floats(step.num_states).abs())

    return penalties.apply_penalties, [
        step.logits(vocab),
        step.expanded,
        step.ints(0, vocab, step.rows),
        step.local_pos,
        some(1.0),
        some(0.0),
        some(0.0),
        step.ints(-(2**31), 2**31, step.num_states, -(-vocab // 32)),
        step.ints(0, 3, step.num_states, vocab),
    ]


def apply_bad_words(step: Step, vocab: int) -> Call:
    # Few different tokens, so that words match.
    tokens, words, inputs = step.tokens % 2, step.ints(0, 2, step.num_states, 12), step.ints(0, 2, step.rows)
    offsets = torch.tensor([0, 1, 3, 6, 12], dtype=torch.int32).repeat(step.num_states, 1)
    total = torch.where(step.ints(0, 3, step.num_states) == 0, step.prompt_len, step.total_len).int()
    return bad_words.apply_bad_words, [
        step.logits(max(vocab, 2)),
        step.expanded,
        words,
        offsets,
        step.ints(0, 5, step.num_states),
        tokens,
        step.prompt_len,
        total,
        inputs,
        step.local_pos,
        4,
    ]


def apply_thinking_budget(step: Step, vocab: int) -> Call:
    tokens, inputs = step.tokens % 3, step.ints(0, 3, step.rows)
    markers = [step.ints(0, 3, int(step.rng.integers(1, 4))) for _ in range(3)]

    def launch(logits: Tensor, *args: Tensor) -> None:
        """Without what the kernel caches: the functions search all tokens."""
        cache = torch.full((2, step.num_states), -1, dtype=torch.int32)
        scanned = torch.zeros(step.num_states, dtype=torch.int32)
        thinking_budget.apply_thinking_budget(logits, *args[:7], cache[0], cache[1], scanned, *args[7:])

    return launch, [
        step.logits(max(vocab, 3)),
        step.states,
        step.expanded,
        step.ints(-1, 12, step.num_states),
        tokens,
        step.total_len,
        inputs,
        step.local_pos,
        *markers,
    ]


def apply_temperature(step: Step, vocab: int) -> Call:
    temperatures = step.ints(0, 4, step.num_states) / 2
    return gumbel.apply_temperature, [step.logits(vocab), step.expanded, temperatures]


def apply_min_p(step: Step, vocab: int) -> Call:
    return min_p.apply_min_p, [step.logits(vocab), step.expanded, step.ints(0, 4, step.num_states) / 5]


def sample(
    step: Step,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    with_temperature: bool = False,
    fp64: bool = False,
) -> Call:
    vocab = min(vocab, 1030)  # this kernel's blocks have 1024 tokens
    return gumbel.gumbel_sample, [
        step.logits(vocab).to(dtype),
        step.expanded,
        step.ints(0, 3, step.num_states) / 2,
        step.ints(-(2**63), 2**63 - 1, step.num_states, dtype=np.int64),
        step.ints(0, 2**20, step.rows, dtype=np.int64),
        with_temperature,
        False,
        None,
        None,
        fp64,
    ]


def replay(step: Step, vocab: int) -> Call:
    states = torch.where(step.ints(0, 4, step.num_reqs) == 0, -1, step.states)
    return trace_replay.apply_trace_tokens, [
        step.ints(0, 9, step.num_reqs, dtype=np.int64),
        states,
        step.tokens,
        step.ints(0, 6, step.num_states),
        step.total_len,
        step.prompt_len,
    ]


def sampling_mask(step: Step, vocab: int, most: int = 5) -> Call:
    sampled = torch.from_numpy(step.rng.integers(0, step.drafts + 2)).int()

    def masks(logits: Tensor, starts: Tensor, sampled: Tensor) -> list[Any]:
        made = output.SamplingMaskTensors.from_logits(logits, starts, sampled, most, step.most_drafts + 1)
        return made.tolists(sampled.numpy())

    return masks, [step.logits(vocab), step.cu_num_logits, sampled]


def token_logprobs(step: Step, vocab: int) -> Call:
    return logprob.compute_token_logprobs, [step.floats(step.rows, vocab), step.ints(0, vocab, step.rows, 3)]


def topk_scores(step: Step, vocab: int, num_custom: int = 0) -> Call:
    state = SimpleNamespace(
        num_token_ids=SimpleNamespace(gpu=step.ints(0, num_custom + 1, step.num_states)),
        token_ids=SimpleNamespace(gpu=step.ints(0, vocab, step.num_states, max(num_custom, 1))),
    )
    sampled = step.ints(0, vocab, step.rows, dtype=np.int64)
    # Without equal logits, whose order topk leaves open.
    return logprob.compute_topk_scores, [
        step.floats(step.rows, vocab),
        min(2, vocab),
        sampled,
        None,
        state,
        step.expanded,
        num_custom,
    ]


def prompt_token_ids(step: Step, vocab: int) -> Call:
    arguments = [step.num_tokens, step.starts, step.states, step.computed, step.tokens]
    return prompt_logprob.get_prompt_logprobs_token_ids, arguments


CASES: dict[str, Callable[[Step, int], Call]] = {
    "prepare_prefill_inputs": prepare_prefill_inputs,
    "prepare_pos_seq_lens": prepare_pos_seq_lens,
    "prepare_rope_positions": prepare_rope_positions,
    "combine_sampled_and_draft_tokens": combine,
    "combine without a new token": lambda step, vocab: combine(step, vocab, num_new=0),
    "get_num_sampled_and_rejected": num_sampled_and_rejected,
    "post_update": post_update,
    "post_update without counts": lambda step, vocab: post_update(step, vocab, with_counts=False),
    "post_update_num_computed_tokens": post_update_computed,
    "expand_idx_mapping": expand,
    "bias": bias,
    "bias where only stop tokens are left": lambda step, vocab: bias(step, vocab, restores=True),
    "bincount": bincount,
    "penalties": apply_penalties,
    "bad_words": apply_bad_words,
    "thinking_budget": apply_thinking_budget,
    "temperature": apply_temperature,
    "min_p": apply_min_p,
    "gumbel_sample": sample,
    "gumbel_sample of bfloat16": lambda step, vocab: sample(step, vocab, dtype=torch.bfloat16),
    "gumbel_sample with temperature": lambda step, vocab: sample(step, vocab, with_temperature=True),
    "gumbel_sample with 53 bits": lambda step, vocab: sample(step, vocab, fp64=True),
    "trace_replay": replay,
    "compact_sampling_mask": sampling_mask,
    "token_logprobs": token_logprobs,
    "topk_scores": topk_scores,
    "topk_scores of named tokens": lambda step, vocab: topk_scores(step, vocab, num_custom=3),
    "prompt_logprobs_token_ids": prompt_token_ids,
}
# Vocabularies around the kernels' blocks of 32, 1024 and 8192 tokens.
SIZES = [(1, 1, 0), (1, 33, 1), (3, 1000, 2), (9, 63, 2), (4, 1025, 1), (2, 8193, 2)]
# The interpreter cannot run these, which have tests of their own.
NOT_INTERPRETED = {
    f"{GPU}.structured_outputs._apply_grammar_bitmask_kernel",
    f"{GPU}.metrics.logits._num_nans_kernel",
}


@pytest.mark.parametrize(("num_reqs", "vocab", "most_drafts"), SIZES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_kernel(
    monkeypatch: pytest.MonkeyPatch, case: str, num_reqs: int, vocab: int, most_drafts: int
) -> None:
    torch.manual_seed(0)
    for seed in range(2):
        launch, arguments = CASES[case](Step(num_reqs, seed, most_drafts), vocab)
        theirs, ours = copy.deepcopy(arguments), copy.deepcopy(arguments)
        expected = launch(*theirs)
        with monkeypatch.context() as patch:
            replace_kernels(patch)
            result = launch(*ours)
        assert_same((expected, theirs), (result, ours))


def test_every_kernel_has_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = replace_kernels(monkeypatch)
    for case in CASES.values():
        launch, arguments = case(Step(2, 0), 33)
        launch(*arguments)
    assert launched == KERNELS.keys() - NOT_INTERPRETED


def replace_kernels(patch: pytest.MonkeyPatch) -> set[str]:
    """Put our functions in the place of the kernels, as vLLM's dispatcher does.

    Returns:
        Full names of the kernels that have been launched since.
    """
    launched: set[str] = set()

    class Noting(KernelOverride):
        def __getitem__(self, grid: Any) -> Any:
            launched.add(self.full_name)
            return super().__getitem__(grid)

    for name, function in KERNELS.items():
        module, _, attribute = name.rpartition(".")
        override = Noting(getattr(import_module(module), attribute), function)
        override.full_name = name
        patch.setattr(import_module(module), attribute, override)
    return launched


@pytest.mark.parametrize("vocab", [31, 32, 1000, 8193])
def test_grammar(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against xgrammar's own operator for the CPU; a row beyond a request's own is left alone."""
    import xgrammar

    replace_kernels(monkeypatch)
    step = Step(5, seed=vocab)
    logits = step.floats(step.rows, vocab)
    masks = step.ints(-(2**31), 2**31, step.num_reqs, -(-vocab // 32))
    places = step.rng.integers(0, 3, step.num_reqs)
    indices = torch.from_numpy(np.arange(step.num_reqs) * 3 + places).int()
    expected = logits.clone()
    for request, place in enumerate(places):
        row = int(step.cu_num_logits[request]) + place
        if place <= step.drafts[request]:
            xgrammar.apply_token_bitmask_inplace(expected[row : row + 1], masks[request : request + 1])
    structured_outputs._apply_grammar_bitmask_kernel[(step.num_reqs, 1)](
        logits,
        vocab,
        indices,
        step.cu_num_logits,
        masks,
        masks.stride(0),
        vocab,
        MASK_STRIDE=3,
        BLOCK_SIZE=8192,
    )
    assert torch.equal(logits, expected)


def test_numbers_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_kernels(monkeypatch)
    logits = torch.tensor([[0.0, torch.nan, torch.inf], [torch.nan, torch.nan, -torch.inf], [1.0, 2.0, 3.0]])
    assert nans.get_num_nans(logits).tolist() == [1, 2, 0]


METHODS = {
    "StagedWriteTensor": ("apply_write",),
    "FusedStagedWriter": ("apply",),
    "BlockTables": ("gather_block_tables", "compute_slot_mappings"),
}


@pytest.mark.parametrize("block_sizes", [[16], [32, 16, 1]])
@pytest.mark.parametrize("seed", range(3))
def test_block_tables(monkeypatch: pytest.MonkeyPatch, block_sizes: list[int], seed: int) -> None:
    """Against vLLM's methods, which launch kernels."""
    expected = tables_of(block_sizes, seed)
    for owner, names in METHODS.items():
        for name in names:
            patched = getattr(block_table, owner, None) or getattr(buffer_utils, owner)
            monkeypatch.setattr(patched, name, getattr(blocks, name))
    assert_same(expected, tables_of(block_sizes, seed))


def tables_of(block_sizes: list[int], seed: int) -> list[Any]:
    """Block tables and slots of a step after blocks have been appended and overwritten."""
    step = Step(4, seed)
    enabled = [index != 1 for index in range(len(block_sizes))]
    tables = block_table.BlockTables(
        block_sizes,
        step.num_states,
        200,
        [MAX_LEN] * len(block_sizes),
        torch.device("cpu"),
        slot_mapping_enabled=enabled,
    )
    for overwrite, most in ((True, 20), (False, 20), (True, MAX_LEN)):
        for state in range(step.num_states):
            ids = [
                step.ints(0, 99, int(step.rng.integers(MAX_LEN - 20 if most > 20 else 0, most))).tolist()
                for _ in block_sizes
            ]
            if overwrite or state % 2:
                tables.append_block_ids(state, tuple(ids), overwrite)
        tables.apply_staged_writes()
        tables.apply_staged_writes()  # nothing is left
    for table in tables.input_block_tables:
        table.fill_(-5)
    gathered = tables.gather_block_tables(step.states, step.num_reqs + 2)
    held = tables.num_blocks.np[:, step.states]
    rows = [
        [table[row, : held[group, row]] for row in range(step.num_reqs)] + [table[step.num_reqs :]]
        for group, table in enumerate(gathered)
    ]
    states = torch.where(step.ints(0, 4, step.num_reqs) == 0, -1, step.states)
    positions = step.ints(0, 19, step.num_tokens, dtype=np.int64)
    slots = tables.compute_slot_mappings(states, step.starts, positions, step.num_tokens + 3)
    # A tensor of numbers, one of floats, and rows that are written from within.
    written = buffer_utils.StagedWriteTensor((5, 7), torch.float32, torch.device("cpu"))
    written.stage_write(3, 2, [1.5, 2.5])
    written.stage_write(0, 0, [])
    written.stage_write(4, 6, [3.5])
    written.apply_write()
    lengths = buffer_utils.StagedWriteTensor(5, torch.int32, torch.device("cpu"))
    lengths.stage_write_elem(4, 9)
    lengths.apply_write()
    return [
        rows,
        slots.clone(),
        tables.slot_mappings,
        [table.gpu for table in tables.block_tables],
        written.gpu,
        lengths.gpu,
    ]


def assert_same(expected: Any, result: Any) -> None:
    """Equal integers, and floats up to rounding: the order of sums differs."""
    if isinstance(expected, Tensor):
        assert expected.dtype == result.dtype
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-6, equal_nan=True)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(result, expected)
    elif isinstance(expected, list | tuple):
        for one, other in zip(expected, result, strict=True):
            assert_same(one, other)
    elif hasattr(expected, "__dict__"):
        assert_same(list(vars(expected).values()), list(vars(result).values()))
    else:
        assert result == expected
