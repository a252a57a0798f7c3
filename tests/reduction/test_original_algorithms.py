"""ToMe, EViT and FastV against their authors' own algorithms, written again from their papers.

Table 1 of arXiv:2411.17686 claims that the three stages do the same as the originals: here to 1e-5, in
float64 on the side of the originals, which use nothing of the package.
"""

import torch
from torch import Tensor

from ficoco_vllm.reduction import Signals, reduce
from ficoco_vllm.reduction.testing import make_signals, make_tokens
from tests.reduction.transcription import transcribes

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def original_tome(tokens: Tensor, size: Tensor, keys: Tensor, r: int) -> dict[int, tuple[Tensor, float]]:
    """Bipartite soft matching of one image, without [CLS] (arXiv:2210.09461, Sec. 3).

    Returns:
        Index of each token that is left, to its features and its size.
    """
    tokens, keys = tokens.double(), keys.double()
    unit = keys / keys.norm(dim=-1, keepdim=True)
    a, b = list(range(0, len(tokens), 2)), list(range(1, len(tokens), 2))
    edges = []
    for i in a:  # one edge from every token of A, to its most similar token of B
        similarity = [float(unit[i] @ unit[j]) for j in b]
        best = max(range(len(b)), key=lambda index: similarity[index])
        edges.append((similarity[best], i, b[best]))
    edges.sort(key=lambda edge: -edge[0])
    total = {j: tokens[j] * size[j] for j in range(len(tokens))}
    mass = {j: float(size[j]) for j in range(len(tokens))}
    for _, i, j in edges[:r]:  # the r most similar edges, averaged weighted by size
        total[j] = total[j] + total.pop(i)
        mass[j] += mass.pop(i)
    return {j: (total[j] / mass[j], mass[j]) for j in total}


def test_tome_over_three_layers() -> None:
    N, r = 41, 7
    position = torch.arange(N)[None]
    tokens, size = make_tokens(1, N), torch.ones(1, N)
    want_tokens, want_size = tokens[0].double(), size[0].double()
    for layer in range(3):
        keys = make_signals(1, tokens.shape[1], seed=layer).keys
        want = original_tome(want_tokens, want_size, keys[0], r)
        order = sorted(want)
        want_tokens = torch.stack([want[j][0] for j in order])
        want_size = torch.tensor([want[j][1] for j in order], dtype=torch.float64)
        before = position
        signals = Signals(keys=keys, position=position, grid=(1, N))
        tokens, size, position = reduce("tome", tokens, signals, r, size)
        assert position[0].tolist() == before[0, order].tolist()
        torch.testing.assert_close(tokens[0].double(), want_tokens, **TOLERANCE)
        torch.testing.assert_close(size[0].double(), want_size, **TOLERANCE)


def original_evit(tokens: Tensor, cls_attention: Tensor, num_kept: int) -> tuple[list[int], Tensor]:
    """Token reorganisation of one image (arXiv:2202.07800, Sec. 3).

    Returns:
        The attentive tokens from the most attended on, and the features with the fused token at the end.
    """
    order = sorted(range(len(tokens)), key=lambda index: -float(cls_attention[index]))
    attentive, inattentive = order[:num_kept], order[num_kept:]
    fused = sum(float(cls_attention[i]) * tokens[i].double() for i in inattentive)
    return attentive, torch.stack([*(tokens[i].double() for i in attentive), fused])


def test_evit_over_two_layers() -> None:
    N, R = 30, 10
    tokens, position = make_tokens(1, N), torch.arange(N)[None]
    for layer in range(2):
        n = tokens.shape[1]
        attention = make_signals(1, n, seed=layer).cls_attention
        attentive, want = original_evit(tokens[0], attention[0], n - R)
        signals = Signals(cls_attention=attention, position=position, grid=(5, 6))
        got = reduce("evit", tokens, signals, R)
        assert set(got.position[0, :-1].tolist()) == {int(position[0, i]) for i in attentive}
        # Theirs is sorted by attention, ours by place: the same rows in another order.
        back = sorted(range(n - R), key=lambda index: attentive[index])
        torch.testing.assert_close(got.tokens[0].double(), want[[*back, n - R]], **TOLERANCE)
        tokens, position = got.tokens, got.position


def original_fastv(attention: Tensor, image: slice, num_kept: int) -> list[int]:
    """Ranking of one image (arXiv:2403.06764, Sec. 4, as in the authors' code).

    Args:
        attention: (H, L, L) of the whole prompt.
        image: where the image tokens are.
        num_kept: how many stay.

    Returns:
        Kept image tokens, counted from the first, in order.
    """
    last_query = attention.double().mean(dim=0)[-1, image]
    return sorted(sorted(range(len(last_query)), key=lambda index: -float(last_query[index]))[:num_kept])


@transcribes("fastv")
def test_fastv_on_a_causal_prompt() -> None:
    system, N, text, R = 4, 25, 6, 12
    L = system + N + text
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(4, L, L, generator=generator) + torch.full((L, L), -torch.inf).triu(1)
    attention = scores.softmax(dim=-1)
    image = slice(system, system + N)
    mean = attention.mean(dim=0)[None]
    signals = Signals(
        visual_attention=mean[:, image, image],
        text_attention=mean[:, system + N :, image],
        position=torch.arange(N)[None],
        grid=(5, 5),
    )
    tokens = make_tokens(1, N)
    kept = original_fastv(attention, image, N - R)
    got = reduce("fastv", tokens, signals, R)
    assert got.position[0].tolist() == kept
    assert torch.equal(got.tokens[0], tokens[0, kept])

    # The paper's words instead: the average attention that one token received from all others (Eq. 5).
    received = [sum(float(mean[0, query, system + i]) for query in range(L)) for i in range(N)]
    kept = sorted(sorted(range(N), key=lambda index: -received[index])[: N - R])
    assert reduce("fastv", tokens, signals, R, queries="all").position[0].tolist() == kept
