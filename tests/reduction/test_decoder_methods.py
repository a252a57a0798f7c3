"""The decoder-side methods against plain float64 transcriptions, and the pipeline of both sites."""

import pytest
import torch

from ficoco_vllm.reduction import Signals, get, reduce
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.reduction.testing import make_signals, make_tokens
from tests.reduction import reference
from tests.reduction.transcription import transcribes

N, R, M = 30, 11, 5


def causal(seed: int = 0) -> Signals:
    """Signals whose visual attention is causal, as in a decoder, after a system prompt of four tokens."""
    signals = make_signals(1, N, seed=seed, M=M, grid=(6, 6))
    scores = torch.randn(1, 4 + N, 4 + N, generator=torch.Generator().manual_seed(seed))
    attention = (2 * scores + torch.full((4 + N, 4 + N), -torch.inf).triu(1)).softmax(dim=-1)
    return Signals(**{**vars(signals), "visual_attention": attention[:, 4:, 4:]})


ABLATIONS = [
    {},
    {"local_redundancy": False},
    {"task_redundancy": False},
    {"local_penalty": True},
    {"indirect_correlation": False},
    {"direct_correlation": False},
    {"fixed_k": 0},
    {"fixed_k": 1},
    {"fixed_k": 2},
    {"average": True},
    {"average": True, "epsilon": 0.8},
    {"beta": 0.2, "gamma": 0.9, "epsilon": 0.8},
]


@transcribes("ficoco-l")
@pytest.mark.parametrize("settings", ABLATIONS, ids=str)
def test_ficoco_l(settings: dict) -> None:
    """Eqs. 14, 15 and 13."""
    signals, tokens = causal(), make_tokens(1, N)
    visual, text = signals.visual_attention[0].double(), signals.text_attention[0].double()
    beta, gamma = settings.get("beta", 0.6), settings.get("gamma", 0.6)
    local, task = settings.get("local_redundancy", True), settings.get("task_redundancy", True)
    scores = [
        (beta / N * sum(float(visual[i, j]) for j in range(N)) if local else 0.0)
        - ((1 - beta) * sum(float(text[k, i]) for k in range(M)) if task else 0.0)
        for i in range(N)
    ]
    position = signals.position[0].tolist()
    if settings.get("local_penalty", False):
        scores = reference.local_penalty(scores, position, signals.grid, (2, 2), 2.0)
    source, target = reference.split(scores, R)
    direct, indirect = settings.get("direct_correlation", True), settings.get("indirect_correlation", True)
    correlation = [
        [
            (gamma * float(visual[i, j]) if direct else 0.0)
            + ((1 - gamma) * sum(float(text[k, i] * text[k, j]) for k in range(M)) if indirect else 0.0)
            for j in target
        ]
        for i in source
    ]
    keep = {key: settings[key] for key in ("epsilon", "fixed_k", "average") if key in settings}
    size = torch.rand(1, N) + 0.5
    want, mass = reference.quantile_merge(tokens[0], size[0], source, target, correlation, **keep)
    got = reduce("ficoco-l", tokens, signals, R, size, **settings)
    assert got.position[0].tolist() == [position[j] for j in target]
    torch.testing.assert_close(got.tokens[0].double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.size[0], mass, rtol=1e-5, atol=1e-5)


def test_the_first_token_attends_to_nothing_before_it() -> None:
    """Without the indirect term a source that attends to no target is dropped, not divided by zero."""
    attention = torch.eye(4)[None]  # every token attends to itself only
    text = torch.tensor([[[0.0, 0.3, 0.3, 0.3]]])
    signals = Signals(
        visual_attention=attention, text_attention=text, position=torch.arange(4)[None], grid=(2, 2)
    )
    tokens = make_tokens(1, 4)
    got = reduce("ficoco-l", tokens, signals, 1, indirect_correlation=False)
    assert torch.equal(got.tokens, tokens[:, 1:])
    assert got.size.tolist() == [[1.0, 1.0, 1.0]]


def pruned_to(scores: list[float], name: str, signals: Signals, **settings: object) -> None:
    tokens = make_tokens(1, N)
    target = reference.split(scores, R)[1]
    got = reduce(name, tokens, signals, R, **settings)
    assert got.position[0].tolist() == signals.position[0, target].tolist()
    assert torch.equal(got.tokens[0], tokens[0, target])


@transcribes("pyramiddrop")
def test_pyramiddrop() -> None:
    signals = causal()
    pruned_to([-float(value) for value in signals.text_attention[0, -1]], "pyramiddrop", signals)


@transcribes("fitprune")
def test_fitprune() -> None:
    signals = causal()
    visual, text = signals.visual_attention[0].double(), signals.text_attention[0].double()
    scores = [
        -sum(float(visual[j, i]) for j in range(N)) / N * sum(float(text[k, i]) for k in range(M))
        for i in range(N)
    ]
    pruned_to(scores, "fitprune", signals)


@transcribes("sparsevlm")
@pytest.mark.parametrize(("share", "per_cluster"), [(0.3, 10), (0.5, 4), (0.0, 10), (1.0, 3)])
def test_sparsevlm(share: float, per_cluster: int) -> None:
    signals, tokens, K = causal(), make_tokens(1, N), N - R
    visual, text = signals.features[0].double(), signals.text_features[0].double()
    alike = (visual @ text.T).softmax(dim=-1).mean(dim=0)
    raters = [k for k in range(M) if alike[k] > alike.mean()]
    assert 0 < len(raters) < M
    rated = [sum(float(signals.text_attention[0, k, i]) for k in raters) / len(raters) for i in range(N)]
    order = sorted(range(N), key=lambda i: (-rated[i], i))

    def counts(selected: int) -> tuple[int, int]:
        recycled = min(N - selected, int((N - selected) * share) + 1)
        return recycled, min(recycled, recycled // per_cluster + 1)

    selected = next(s for s in range(K, -1, -1) if s + counts(s)[1] == K)
    num_recycled, num_clusters = counts(selected)
    kept, pool = order[:selected], order[selected : selected + num_recycled]
    distance = {
        (a, b): float((visual[a] - visual[b]).norm()) / visual.shape[1] ** 0.5 for a in pool for b in pool
    }
    density = []
    for a in pool:
        nearest = sorted(distance[a, b] ** 2 for b in pool)[:num_clusters]
        density.append(float(torch.tensor(-sum(nearest) / num_clusters).double().exp()))
    peak = []
    for x, a in enumerate(pool):
        gaps = [
            distance[a, b]
            for y, b in enumerate(pool)
            if density[y] > density[x] or (density[y] == density[x] and y < x)
        ]
        peak.append(min(gaps, default=max(distance.values())) * density[x])
    centres = [pool[x] for x in sorted(range(len(pool)), key=lambda x: (-peak[x], x))[:num_clusters]]
    target = sorted(kept + centres)
    groups = {j: [j] for j in target}
    for i in pool:
        if i not in centres:
            groups[min(centres, key=lambda j: distance[i, j])].append(i)
    want = torch.stack([tokens[0, groups[j]].double().mean(dim=0) for j in target])
    settings = {"recycled_share": share, "tokens_per_cluster": per_cluster}
    got = reduce("sparsevlm", tokens, signals, R, **settings)
    assert got.position[0].tolist() == signals.position[0, target].tolist()
    torch.testing.assert_close(got.tokens[0].double(), want, rtol=1e-5, atol=1e-5)


def test_sparsevlm_where_one_text_token_is_all_there_is() -> None:
    """Its similarity to the image is not above average, yet it rates."""
    signals = make_signals(1, 12, M=1)
    got = reduce("sparsevlm", make_tokens(1, 12), signals, 5, recycled_share=0.0)
    best = reference.split([-float(value) for value in signals.text_attention[0, 0]], 5)[1]
    assert got.position[0].tolist() == signals.position[0, best].tolist()


@transcribes("vscan-l")
def test_vscan_l() -> None:
    signals = causal()
    pruned_to([-float(value) for value in signals.text_attention[0, -1]], "vscan-l", signals)
    assert get("vscan-l").configure().settings.model_dump()["layers"] == (16,)
    assert get("vscan-l").default_schedule == "one-shot"


def test_the_schedules_of_the_authors() -> None:
    assert get("ficoco-l").configure().settings.model_dump()["start_layer"] == 3
    assert get("fastv").default_schedule == "one-shot"
    assert get("pyramiddrop").default_schedule == "geometric"
    assert get("pyramiddrop").configure().settings.model_dump()["layers"] == (8, 16, 24)


def test_ficoco_vl_is_v_and_then_l() -> None:
    pipeline = PIPELINES["ficoco-vl"]
    assert (pipeline.encoder, pipeline.decoder) == (get("ficoco-v"), get("ficoco-l"))
    assert pipeline.encoder_keep(576, 64) == 192
    assert pipeline.encoder_keep(576, 576) == 576
    with pytest.raises(ValueError, match="keep = 0"):
        pipeline.encoder_keep(576, 0)
    with pytest.raises(ValueError, match="'ficoco-v' and then by 'ficoco-l'"):
        get("ficoco-vl")

    first = make_signals(1, 36, grid=(6, 6))
    middle = reduce(pipeline.encoder, make_tokens(1, 36), first, 36 - pipeline.encoder_keep(36, 9))
    second = make_signals(1, 18, seed=2)
    second = Signals(**{**vars(second), "position": middle.position, "grid": (6, 6)})
    last = reduce(pipeline.decoder, middle.tokens, second, 9, middle.size)
    assert last.tokens.shape[1] == 9
    assert torch.isin(last.position, middle.position).all()
    torch.testing.assert_close(last.size.sum(), torch.tensor(36.0), rtol=1e-5, atol=0)
