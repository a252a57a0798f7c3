"""An observer receives the actual reduction."""

import pytest
import torch

from ficoco_vllm.reduction import Method, Observation, available, get
from ficoco_vllm.reduction.testing import make_signals, make_tokens
from tests.reduction import reference


@pytest.fixture(params=available())
def method(request: pytest.FixtureRequest) -> Method:
    return get(request.param)


def observe(
    method: Method, N: int, R: int, B: int = 2, **settings: object
) -> tuple[Observation, torch.Tensor]:
    """One reduction with an observer, and the reduced tokens."""
    seen: list[Observation] = []
    size = torch.rand(B, N) + 0.5
    reducer = method.configure(**settings)
    reduced = reducer(make_tokens(B, N), make_signals(B, N), R, size, observer=seen.append)
    plain = reducer(make_tokens(B, N), make_signals(B, N), R, size)
    assert all(torch.equal(one, other) for one, other in zip(reduced, plain, strict=True))
    (observation,) = seen
    assert observation.new_size is reduced.size
    assert observation.position is reduced.position
    return observation, reduced.tokens


def test_weights_make_the_reduced_tokens(method: Method) -> None:
    N, R = 40, 13
    seen, tokens = observe(method, N, R)
    for index in range(2):
        # The same function on the same scores; sums of some 40 fp32 products in another order.
        torch.testing.assert_close(
            seen.weights(index) @ make_tokens(2, N)[index], tokens[index], rtol=1e-5, atol=1e-5
        )


def test_shares_of_a_source_sum_to_one_or_it_is_dropped(method: Method) -> None:
    seen, _ = observe(method, 40, 13)
    for index in range(2):
        shares = seen.shares(index)
        assert shares.shape == (13, 27 + method.num_extra)
        assert (shares >= 0).all()
        total = shares.sum(dim=1)
        kept = total > 0.5
        torch.testing.assert_close(total, kept.float(), rtol=0, atol=1e-5)
        if method.merges and method.num_extra == 0:
            assert kept.all()


@pytest.mark.parametrize("epsilon", [0.998, 0.9, 0.5])
def test_shares_of_the_quantile_merge_are_alpha(epsilon: float) -> None:
    """Eq. 13, one pair at a time."""
    N, R = 20, 7
    seen, _ = observe(get("ficoco-v"), N, R, epsilon=epsilon)
    sizes = torch.zeros(2, N - R)
    for index in range(2):
        shares = seen.shares(index)
        for row in range(R):
            scores = seen.correlation[index, row].tolist()
            threshold = reference.quantile(scores, epsilon)
            # The threshold is computed in fp32; all other scores are well away from it.
            chosen = [score if score >= threshold - 1e-7 else 0.0 for score in scores]
            alpha = torch.tensor(chosen) / sum(chosen)
            torch.testing.assert_close(shares[row], alpha, rtol=0, atol=1e-6)
        sizes[index] = seen.size[index][seen.partition.target[index]]
        sizes[index] += seen.size[index][seen.partition.source[index]] @ shares
    torch.testing.assert_close(sizes, seen.new_size, rtol=0, atol=1e-5)


def test_a_pruned_token_goes_nowhere() -> None:
    seen, _ = observe(get("topk-cls"), 20, 7)
    assert not seen.shares(0).any()


def test_an_empty_reduction_is_not_observed() -> None:
    seen: list[Observation] = []
    get("ficoco-v").configure()(make_tokens(1, 9), make_signals(1, 9), 0, observer=seen.append)
    assert not seen
