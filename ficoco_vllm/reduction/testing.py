"""The contract of a reduction method as pytest tests, for methods of this package and of others.

    from ficoco_vllm.reduction.testing import MethodContract


    class TestSmallNorm(MethodContract):
        method = "small-norm"

pytest runs every rule of the contract on the method, with its default settings.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ficoco_vllm.reduction import Method, Reduced, Signals, get, reduce
from ficoco_vllm.reduction.signals import via_text
from ficoco_vllm.reduction.stages import COMPRESSIONS

_MEASURED = ("visual_attention", "cls_attention", "text_attention", "keys", "text_relevance")


def make_signals(
    B: int, N: int, seed: int = 0, M: int = 5, D: int = 16, grid: tuple[int, int] | None = None
) -> Signals:
    """Random signals of B images in fp32: attention is a softmax, and scores are well separated.

    Args:
        B: images.
        N: visual tokens that are left of the grid's.
        seed: seed of the random numbers.
        M: text tokens.
        D: width of the features.
        grid: rows and columns; None means the smallest square that holds N tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    if grid is None:
        side = math.ceil(math.sqrt(N))
        grid = (side, side)
    cells = grid[0] * grid[1]
    alive = torch.stack([torch.randperm(cells, generator=generator)[:N].sort().values for _ in range(B)])
    attention = torch.softmax(2 * torch.randn(B, N + 1, N + 1, generator=generator), dim=-1)
    text = torch.softmax(2 * torch.randn(B, M, N + M, generator=generator), dim=-1)
    return Signals(
        visual_attention=attention[:, 1:, 1:].contiguous(),
        cls_attention=attention[:, 0, 1:].contiguous(),
        text_attention=text[:, :, :N].contiguous(),
        keys=torch.randn(B, N, 8, generator=generator),
        features=torch.randn(B, N, D, generator=generator),
        text_features=torch.randn(B, M, D, generator=generator),
        text_relevance=torch.randn(B, N, generator=generator),
        shallow_cls_attention=torch.softmax(2 * torch.randn(B, N + 1, generator=generator), dim=-1)[:, 1:],
        position=alive,
        grid=grid,
    )


def make_tokens(B: int, N: int, D: int = 16, seed: int = 1) -> Tensor:
    """Tokens (B, N, D) in fp32."""
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed))


def one(signals: Signals, index: int) -> Signals:
    """The signals of one image of the batch, still batched."""
    return _mapped(signals, lambda value: value[index : index + 1])


class LazyMap:
    """An `AttentionMap` over a tensor that records which of its methods are called."""

    def __init__(self, attention: Tensor) -> None:
        self.attention, self.shape, self.calls = attention, attention.shape, set[str]()

    def row_sum(self) -> Tensor:
        """See `AttentionMap`."""
        self.calls.add("row_sum")
        return self.attention.sum(-1)

    def column_sum(self) -> Tensor:
        """See `AttentionMap`."""
        self.calls.add("column_sum")
        return self.attention.sum(1)

    def block(self, source: Tensor, target: Tensor, text: Tensor | None = None, gamma: float = 1.0) -> Tensor:
        """See `AttentionMap`."""
        self.calls.add("block")
        items = zip(self.attention, source, target, strict=True)
        direct = torch.stack([image[rows][:, columns] for image, rows, columns in items])
        return direct if text is None else via_text(direct, text, source, target, gamma)

    def dense(self) -> Tensor:
        """See `AttentionMap`."""
        self.calls.add("dense")
        return self.attention


class MethodContract:
    """Contract tests of a method. Subclass it as a class `Test...` and set `method`.

    Attributes:
        method: the method, or its name in the registry.
    """

    method: str | Method

    @pytest.fixture
    def checked(self) -> Method:
        """The method under test."""
        return get(self.method) if isinstance(self.method, str) else self.method

    @pytest.mark.parametrize("N", [1, 2, 63, 577])
    def test_exact_count_dtype_and_positions(self, checked: Method, N: int) -> None:
        signals, R = make_signals(1, N), _some(checked, N)
        tokens = make_tokens(1, N).to(torch.bfloat16)
        got = reduce(checked, tokens, signals, R)
        E = checked.num_extra if R else 0
        assert got.tokens.shape == (1, N - R + E, tokens.shape[2])
        assert got.size.shape == got.position.shape == (1, N - R + E)
        assert (got.tokens.dtype, got.size.dtype, got.position.dtype) == (
            torch.bfloat16,
            torch.float32,
            torch.int64,
        )
        kept, extra = got.position[0, : N - R], got.position[0, N - R :]
        assert (kept.diff() > 0).all(), "order kept, none twice"
        assert torch.isin(kept, signals.position[0]).all()
        assert (extra == -1).all()
        assert got.tokens.isfinite().all()

    def test_no_token_is_invented(self, checked: Method) -> None:
        N = 40
        signals, R = make_signals(2, N), _some(checked, N)
        size = torch.rand(2, N) + 0.5
        got = _weights(checked, signals, R, size)
        W, E = got.tokens, checked.num_extra
        assert (W >= 0).all()
        kept = (signals.position[:, None] == got.position[:, : N - R, None]).float()
        if checked.compress is COMPRESSIONS["prune"]:
            assert torch.equal(W, kept), "rows are exact copies"
            assert torch.equal(got.size, (kept * size[:, None]).sum(-1))
        elif checked.compress in (COMPRESSIONS["quantile_merge"], COMPRESSIONS["nearest_merge"]):
            torch.testing.assert_close(W.sum(-1), torch.ones(2, N - R), rtol=0, atol=1e-5)
            assert ((W * kept).sum(-1) > 0).all(), "every kept token keeps a part of itself"
        else:
            own = W[:, : N - R]
            torch.testing.assert_close((own * kept).sum(-1), torch.ones(2, N - R), rtol=0, atol=0)
        tokens = make_tokens(2, N)
        again = reduce(checked, tokens, signals, R, size)
        # Given the signals a reduction is linear in the tokens; sums of some 40 fp32 products.
        torch.testing.assert_close(again.tokens, W @ tokens, rtol=1e-5, atol=1e-5)
        assert W.shape[1] == N - R + E

    def test_size_is_conserved_by_merging(self, checked: Method) -> None:
        N = 48
        signals, R = make_signals(2, N), _some(checked, N)
        size = torch.rand(2, N) + 0.5
        total = reduce(checked, make_tokens(2, N), signals, R, size).size.sum(-1)
        if checked.merges:
            torch.testing.assert_close(total, size.sum(-1), rtol=1e-5, atol=0)
        else:
            assert (total <= size.sum(-1) + 1e-4).all()

    def test_three_rounds_end_at_the_count_and_the_mass(self, checked: Method) -> None:
        N = 60
        signals = make_signals(1, N)
        tokens, size = make_tokens(1, N), torch.ones(1, N)
        for _ in range(3):
            n = tokens.shape[1]
            fresh = make_signals(1, n, seed=n)
            tokens, size, position = reduce(
                checked, tokens, replace(fresh, position=signals.position, grid=signals.grid), 9, size
            )
            signals = replace(signals, position=position)
        assert tokens.shape[1] == N - 27 + 3 * checked.num_extra
        assert tokens.isfinite().all()
        if checked.merges:
            torch.testing.assert_close(size.sum(), torch.tensor(float(N)), rtol=1e-5, atol=0)

    def test_protected_tokens_stay(self, checked: Method) -> None:
        N = 30
        signals, R = make_signals(2, N), 9
        protected = torch.tensor([2, 3, 17, 29])

        @functools.wraps(checked.filter.function)
        def protect(*arguments: Any, **optional: Any) -> Any:
            return checked.filter.function(*arguments, **optional).index_fill(1, protected, -torch.inf)

        careful = replace(checked, filter=replace(checked.filter, function=protect))
        got = reduce(careful, make_tokens(2, N), signals, R)
        for b in range(2):
            assert torch.isin(signals.position[b, protected], got.position[b]).all()

    def test_zero_removed_is_the_identity(self, checked: Method) -> None:
        signals, tokens = make_signals(2, 25), make_tokens(2, 25)
        size = torch.rand(2, 25)
        got = reduce(checked, tokens, signals, 0, size)
        assert torch.equal(got.tokens, tokens)
        assert torch.equal(got.size, size)
        assert torch.equal(got.position, signals.position)

    def test_an_image_does_not_know_its_batch(self, checked: Method) -> None:
        B, N = 3, 36
        signals, tokens, R = make_signals(B, N), make_tokens(B, N), _some(checked, N)
        together = reduce(checked, tokens, signals, R)
        order = torch.tensor([2, 0, 1])
        shuffled = reduce(
            checked,
            tokens[order],
            _mapped(signals, lambda value: value[order]),
            R,
        )
        assert torch.equal(shuffled.position, together.position[order])
        torch.testing.assert_close(shuffled.tokens, together.tokens[order], rtol=1e-5, atol=1e-5)
        for b in range(B):
            alone = reduce(checked, tokens[b : b + 1], one(signals, b), R)
            assert torch.equal(alone.position[0], together.position[b])
            torch.testing.assert_close(alone.tokens[0], together.tokens[b], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_decisions_on_half_precision_are_those_on_float64(
        self, checked: Method, dtype: torch.dtype
    ) -> None:
        N = 50
        half = _cast(make_signals(2, N), dtype)
        tokens, R = make_tokens(2, N).to(dtype), _some(checked, N)
        got = reduce(checked, tokens, half, R)
        want = reduce(checked, tokens.double(), _cast(half, torch.float64), R)
        assert torch.equal(got.position, want.position)
        # One rounding to the half type at the end: 2^-8 for bfloat16, relative to values of a few units.
        torch.testing.assert_close(got.tokens.double(), want.tokens, rtol=8e-3, atol=8e-3)

    def test_only_named_signals_are_read(self, checked: Method) -> None:
        N = 32
        signals, tokens, R = make_signals(2, N), make_tokens(2, N), _some(checked, N)
        want = reduce(checked, tokens, signals, R)
        used = checked.required_signals()
        for filler in (torch.nan, None):
            unused: dict[str, Any] = {
                name: None if filler is None else torch.full_like(getattr(signals, name), filler)
                for name in (*_MEASURED, "features", "text_features")
                if name not in used
            }
            got = reduce(checked, tokens, replace(signals, **unused), R)
            assert torch.equal(got.tokens, want.tokens)
            assert torch.equal(got.position, want.position)

    def test_a_missing_signal_is_named(self, checked: Method) -> None:
        signals, tokens = make_signals(1, 16), make_tokens(1, 16)
        for name in checked.required_signals() - {"features"}:
            lacking: dict[str, Any] = {name: None}
            with pytest.raises(ValueError, match=f"{checked.name} needs the signal `{name}`"):
                reduce(checked, tokens, replace(signals, **lacking), 4)

    def test_what_is_pruned_cannot_matter(self, checked: Method) -> None:
        """Not even NaN gets from a pruned token into a kept one."""
        if checked.compress is not COMPRESSIONS["prune"]:
            return
        N, R = 24, min(8, checked.max_removed(24))
        signals, tokens = make_signals(1, N), make_tokens(1, N)
        want = reduce(checked, tokens, signals, R)
        gone = ~torch.isin(signals.position[0], want.position[0])
        tokens[0, gone] = torch.nan
        assert torch.equal(reduce(checked, tokens, signals, R).tokens, want.tokens)

    def test_too_many_removed_is_refused(self, checked: Method) -> None:
        signals, tokens = make_signals(1, 10), make_tokens(1, 10)
        most = checked.max_removed(10)
        reduce(checked, tokens, signals, most)
        for wrong in (most + 1, -1):
            with pytest.raises(ValueError, match=f"removes 0 to {most} of 10 tokens"):
                reduce(checked, tokens, signals, wrong)

    def test_no_host_synchronisation(self, checked: Method) -> None:
        """Fake tensors hold no data: reading a value or a shape that depends on data would raise."""
        N = 24
        signals, tokens, R = make_signals(2, N), make_tokens(2, N), _some(checked, N)
        reducer = checked.configure()
        with FakeTensorMode() as mode:
            fake = _mapped(signals, mode.from_tensor)
            got = reducer(mode.from_tensor(tokens), fake, R)
        assert got.tokens.shape == (2, N - R + checked.num_extra, tokens.shape[2])

    def test_runs_without_autograd(self, checked: Method) -> None:
        signals, tokens = make_signals(1, 20), make_tokens(1, 20)
        R = _some(checked, 20)
        want = reduce(checked, tokens, signals, R)
        with torch.inference_mode():
            got = reduce(checked, tokens, signals, R)
        assert torch.equal(got.tokens, want.tokens)

    def test_a_lazy_attention_map_is_as_good_as_a_dense_one(self, checked: Method) -> None:
        signals, tokens, R = make_signals(2, 30), make_tokens(2, 30), _some(checked, 30)
        assert isinstance(signals.visual_attention, Tensor)
        lazy = LazyMap(signals.visual_attention)
        got = reduce(checked, tokens, replace(signals, visual_attention=lazy), R)
        assert torch.equal(got.tokens, reduce(checked, tokens, signals, R).tokens)
        assert bool(lazy.calls) == ("visual_attention" in checked.required_signals())
        assert "dense" not in lazy.calls, "the whole map is never written"


def _some(method: Method, N: int) -> int:
    """A number to remove: a third of the tokens, and at least one if that is allowed."""
    return min(max(1, N // 3), method.max_removed(N))


def _mapped(signals: Signals, change: Callable[[Tensor], Tensor]) -> Signals:
    values: dict[str, Any] = {
        name: change(value) if isinstance(value, Tensor) else value for name, value in vars(signals).items()
    }
    return Signals(**values)


def _cast(signals: Signals, dtype: torch.dtype) -> Signals:
    changed = {name: getattr(signals, name).to(dtype) for name in (*_MEASURED, "features", "text_features")}
    return replace(signals, **changed)


def _weights(method: Method, signals: Signals, R: int, size: Tensor | None = None) -> Reduced:
    """Reduce the identity matrix: row j of the result holds the weight of each token in token j."""
    B, N = signals.position.shape
    return reduce(method, torch.eye(N).expand(B, N, N).contiguous(), signals, R, size)
