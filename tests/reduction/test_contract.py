"""What every registered method must hold, whoever wrote it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ficoco_vllm.reduction import Method, Reduced, Signals, available, get, partition, reduce
from ficoco_vllm.reduction.signals import via_text
from ficoco_vllm.reduction.stages import COMPRESSIONS
from tests.reduction.inputs import make_signals, make_tokens, one

NAMES = available()
MEASURED = ("visual_attention", "cls_attention", "text_attention", "keys", "text_relevance")


@pytest.fixture(params=NAMES)
def method(request: pytest.FixtureRequest) -> Method:
    return get(request.param)


def some(method: Method, N: int) -> int:
    """A number to remove: a third of the tokens, and at least one if that is allowed."""
    return min(max(1, N // 3), method.max_removed(N))


def cast(signals: Signals, dtype: torch.dtype) -> Signals:
    changed = {name: getattr(signals, name).to(dtype) for name in (*MEASURED, "features", "text_features")}
    return replace(signals, **changed)


def weights(method: Method, signals: Signals, R: int, size: Tensor | None = None) -> Reduced:
    """Reduce the identity matrix: row j of the result says how much of each token went into token j."""
    B, N = signals.position.shape
    return reduce(method, torch.eye(N).expand(B, N, N).contiguous(), signals, R, size)


@pytest.mark.parametrize("N", [1, 2, 63, 577])
def test_exact_count_dtype_and_positions(method: Method, N: int) -> None:
    signals, R = make_signals(1, N), some(method, N)
    tokens = make_tokens(1, N).to(torch.bfloat16)
    got = reduce(method, tokens, signals, R)
    E = method.num_extra if R else 0
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


def test_no_token_is_invented(method: Method) -> None:
    N = 40
    signals, R = make_signals(2, N), some(method, N)
    size = torch.rand(2, N) + 0.5
    got = weights(method, signals, R, size)
    W, E = got.tokens, method.num_extra
    assert (W >= 0).all()
    kept = (signals.position[:, None] == got.position[:, : N - R, None]).float()
    if method.compress is COMPRESSIONS["prune"]:
        assert torch.equal(W, kept), "rows are exact copies"
        assert torch.equal(got.size, (kept * size[:, None]).sum(-1))
    elif method.compress in (COMPRESSIONS["quantile_merge"], COMPRESSIONS["nearest_merge"]):
        torch.testing.assert_close(W.sum(-1), torch.ones(2, N - R), rtol=0, atol=1e-5)
        assert ((W * kept).sum(-1) > 0).all(), "every kept token keeps a part of itself"
    else:
        own = W[:, : N - R]
        torch.testing.assert_close((own * kept).sum(-1), torch.ones(2, N - R), rtol=0, atol=0)
    tokens = make_tokens(2, N)
    again = reduce(method, tokens, signals, R, size)
    # Given the signals a reduction is linear in the tokens; sums of some 40 fp32 products.
    torch.testing.assert_close(again.tokens, W @ tokens, rtol=1e-5, atol=1e-5)
    assert W.shape[1] == N - R + E


def test_size_is_conserved_by_merging(method: Method) -> None:
    N = 48
    signals, R = make_signals(2, N), some(method, N)
    size = torch.rand(2, N) + 0.5
    total = reduce(method, make_tokens(2, N), signals, R, size).size.sum(-1)
    if method.merges:
        torch.testing.assert_close(total, size.sum(-1), rtol=1e-5, atol=0)
    else:
        assert (total <= size.sum(-1) + 1e-4).all()


def test_three_rounds_end_at_the_count_and_the_mass(method: Method) -> None:
    N = 60
    signals = make_signals(1, N)
    tokens, size = make_tokens(1, N), torch.ones(1, N)
    for _ in range(3):
        n = tokens.shape[1]
        fresh = make_signals(1, n, seed=n)
        tokens, size, position = reduce(
            method, tokens, replace(fresh, position=signals.position, grid=signals.grid), 9, size
        )
        signals = replace(signals, position=position)
    assert tokens.shape[1] == N - 27 + 3 * method.num_extra
    assert tokens.isfinite().all()
    if method.merges:
        torch.testing.assert_close(size.sum(), torch.tensor(float(N)), rtol=1e-5, atol=0)


def test_protected_tokens_stay(method: Method) -> None:
    N = 30
    signals, R = make_signals(2, N), 9
    protected = torch.tensor([2, 3, 17, 29])

    def protect(*arguments: object, **implementation: object) -> Tensor:
        return method.filter.function(*arguments, **implementation).index_fill(1, protected, -torch.inf)

    careful = replace(method, filter=replace(method.filter, function=protect))
    got = reduce(careful, make_tokens(2, N), signals, R)
    for b in range(2):
        assert torch.isin(signals.position[b, protected], got.position[b]).all()


def test_zero_removed_is_the_identity(method: Method) -> None:
    signals, tokens = make_signals(2, 25), make_tokens(2, 25)
    size = torch.rand(2, 25)
    got = reduce(method, tokens, signals, 0, size)
    assert torch.equal(got.tokens, tokens)
    assert torch.equal(got.size, size)
    assert torch.equal(got.position, signals.position)


def test_an_image_does_not_know_its_batch(method: Method) -> None:
    B, N = 3, 36
    signals, tokens, R = make_signals(B, N), make_tokens(B, N), some(method, N)
    together = reduce(method, tokens, signals, R)
    order = torch.tensor([2, 0, 1])
    shuffled = reduce(
        method,
        tokens[order],
        Signals(**{k: v[order] if isinstance(v, Tensor) else v for k, v in vars(signals).items()}),
        R,
    )
    assert torch.equal(shuffled.position, together.position[order])
    torch.testing.assert_close(shuffled.tokens, together.tokens[order], rtol=1e-5, atol=1e-5)
    for b in range(B):
        alone = reduce(method, tokens[b : b + 1], one(signals, b), R)
        assert torch.equal(alone.position[0], together.position[b])
        torch.testing.assert_close(alone.tokens[0], together.tokens[b], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decisions_on_half_precision_are_those_on_float64(method: Method, dtype: torch.dtype) -> None:
    N = 50
    half = cast(make_signals(2, N), dtype)
    tokens, R = make_tokens(2, N).to(dtype), some(method, N)
    got = reduce(method, tokens, half, R)
    want = reduce(method, tokens.double(), cast(half, torch.float64), R)
    assert torch.equal(got.position, want.position)
    # One rounding to the half type at the end: 2^-8 for bfloat16, relative to values of a few units.
    torch.testing.assert_close(got.tokens.double(), want.tokens, rtol=8e-3, atol=8e-3)


def test_only_named_signals_are_read(method: Method) -> None:
    N = 32
    signals, tokens, R = make_signals(2, N), make_tokens(2, N), some(method, N)
    want = reduce(method, tokens, signals, R)
    used = method.required_signals()
    for filler in (torch.nan, None):
        unused = {
            name: None if filler is None else torch.full_like(getattr(signals, name), filler)
            for name in (*MEASURED, "features", "text_features")
            if name not in used
        }
        got = reduce(method, tokens, replace(signals, **unused), R)
        assert torch.equal(got.tokens, want.tokens)
        assert torch.equal(got.position, want.position)


def test_a_missing_signal_is_named(method: Method) -> None:
    signals, tokens = make_signals(1, 16), make_tokens(1, 16)
    for name in method.required_signals() - {"features"}:
        with pytest.raises(ValueError, match=f"{method.name} needs the signal `{name}`"):
            reduce(method, tokens, replace(signals, **{name: None}), 4)


@pytest.mark.parametrize("name", [name for name in NAMES if get(name).compress is COMPRESSIONS["prune"]])
def test_what_is_pruned_cannot_matter(name: str) -> None:
    """Not even NaN gets from a pruned token into a kept one."""
    N, R = 24, 8
    signals, tokens = make_signals(1, N), make_tokens(1, N)
    want = reduce(name, tokens, signals, R)
    gone = ~torch.isin(signals.position[0], want.position[0])
    tokens[0, gone] = torch.nan
    assert torch.equal(reduce(name, tokens, signals, R).tokens, want.tokens)


def test_too_many_removed_is_refused(method: Method) -> None:
    signals, tokens = make_signals(1, 10), make_tokens(1, 10)
    most = method.max_removed(10)
    reduce(method, tokens, signals, most)
    for wrong in (most + 1, -1):
        with pytest.raises(ValueError, match=f"removes 0 to {most} of 10 tokens"):
            reduce(method, tokens, signals, wrong)


def test_no_host_synchronisation(method: Method) -> None:
    """Fake tensors hold no data: reading a value or a shape that depends on data would raise."""
    N = 24
    signals, tokens, R = make_signals(2, N), make_tokens(2, N), some(method, N)
    reducer = method.configure()
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in vars(signals).items()}
        got = reducer(mode.from_tensor(tokens), Signals(**fake), R)
    assert got.tokens.shape == (2, N - R + method.num_extra, tokens.shape[2])


def test_runs_without_autograd(method: Method) -> None:
    signals, tokens = make_signals(1, 20), make_tokens(1, 20)
    R = some(method, 20)
    want = reduce(method, tokens, signals, R)
    with torch.inference_mode():
        got = reduce(method, tokens, signals, R)
    assert torch.equal(got.tokens, want.tokens)


@pytest.mark.parametrize(
    "name", ["ficoco-v", "ficoco-l", "tome", "evit", "prumerge-plus", "spatial-pool", "visionzip"]
)
def test_compiles_into_one_graph(name: str) -> None:
    signals, tokens = make_signals(2, 20), make_tokens(2, 20)
    reducer = get(name).configure()

    def run(tokens: Tensor, signals: Signals) -> tuple[Tensor, ...]:
        return tuple(reducer(tokens, signals, 6))

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for got, want in zip(compiled(tokens, signals), run(tokens, signals), strict=True):
        assert torch.equal(got, want)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES),
    B=st.integers(1, 3),
    N=st.integers(2, 40),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_shape(name: str, B: int, N: int, share: float, seed: int) -> None:
    method = get(name)
    R = round(share * method.max_removed(N))
    signals, tokens = make_signals(B, N, seed=seed), make_tokens(B, N, seed=seed)
    got = reduce(method, tokens, signals, R)
    K = N - R
    assert got.tokens.shape[1] == K + (method.num_extra if R else 0)
    assert got.tokens.isfinite().all()
    assert (got.position[:, :K].diff(dim=1) > 0).all()
    if method.merges:
        torch.testing.assert_close(got.size.sum(1), torch.full((B,), float(N)), rtol=1e-5, atol=0)


class Lazy:
    """An attention map that counts what is asked of it."""

    def __init__(self, attention: Tensor) -> None:
        self.attention, self.shape, self.asked = attention, attention.shape, set[str]()

    def row_sum(self) -> Tensor:
        self.asked.add("row_sum")
        return self.attention.sum(-1)

    def column_sum(self) -> Tensor:
        self.asked.add("column_sum")
        return self.attention.sum(1)

    def block(self, source: Tensor, target: Tensor, text: Tensor | None = None, gamma: float = 1.0) -> Tensor:
        self.asked.add("block")
        items = zip(self.attention, source, target, strict=True)
        direct = torch.stack([image[rows][:, columns] for image, rows, columns in items])
        return direct if text is None else via_text(direct, text, source, target, gamma)

    def dense(self) -> Tensor:
        self.asked.add("dense")
        return self.attention


def test_a_lazy_attention_map_is_as_good_as_a_dense_one(method: Method) -> None:
    signals, tokens, R = make_signals(2, 30), make_tokens(2, 30), some(method, 30)
    lazy = Lazy(signals.visual_attention)
    got = reduce(method, tokens, replace(signals, visual_attention=lazy), R)
    assert torch.equal(got.tokens, reduce(method, tokens, signals, R).tokens)
    assert bool(lazy.asked) == ("visual_attention" in method.required_signals())
    assert "dense" not in lazy.asked, "the whole map is never written"
    if method.name in ("ficoco-v", "ficoco-l"):
        assert lazy.asked == {"row_sum", "block"}


def test_ties_leave_in_index_order() -> None:
    source, target = partition(torch.tensor([[1.0, 0.0, 1.0, 2.0, 1.0, -torch.inf]]), 3)
    assert source.tolist() == [[0, 2, 3]]
    assert target.tolist() == [[1, 4, 5]]
    source, _ = partition(torch.zeros(2, 577), 100)
    assert torch.equal(source, torch.arange(100).expand(2, 100))


def test_a_shape_that_does_not_fit_is_named() -> None:
    signals, tokens = make_signals(2, 9), make_tokens(2, 9)
    short = replace(signals, cls_attention=signals.cls_attention[:, 1:])
    with pytest.raises(ValueError, match=r"cls_attention has shape \(2, 8\)"):
        reduce("ficoco-v", tokens, short, 2)
