"""Plain float64 transcriptions of the equations, one image, one token at a time. No package code."""

import math

import torch
from torch import Tensor


def quantile(values: list[float], epsilon: float) -> float:
    """Linear-interpolation quantile."""
    ordered = sorted(values)
    rank = epsilon * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])


def split(scores: list[float], num_removed: int) -> tuple[list[int], list[int]]:
    """The sources with the highest scores, the first of equals, and the targets."""
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return sorted(order[:num_removed]), sorted(order[num_removed:])


def local_penalty(
    scores: list[float],
    position: list[int],
    grid: tuple[int, int],
    window: tuple[int, int],
    coefficient: float,
) -> list[float]:
    """Sec. 3.1: the maximum of each window is enhanced if positive and diminished if negative."""
    result = list(scores)
    for top in range(0, grid[0], window[0]):
        for left in range(0, grid[1], window[1]):
            inside = [
                index
                for index, place in enumerate(position)
                if place >= 0
                and top <= place // grid[1] < top + window[0]
                and left <= place % grid[1] < left + window[1]
            ]
            if inside:
                best = max(inside, key=lambda index: (scores[index], -index))
                factor = coefficient if scores[best] > 0 else 1 / coefficient
                result[best] = scores[best] * factor
    return result


def local_task(
    attention: Tensor, cls: Tensor, lam: float, local: bool = True, task: bool = True
) -> list[float]:
    """Eq. 11."""
    N = len(cls)
    return [
        (lam / N * sum(float(attention[i, j]) for j in range(N)) if local else 0.0)
        - ((1 - lam) * float(cls[i]) if task else 0.0)
        for i in range(N)
    ]


def quantile_merge(
    tokens: Tensor,
    size: Tensor,
    source: list[int],
    target: list[int],
    correlation: list[list[float]],
    epsilon: float = 0.998,
    fixed_k: int | None = None,
    average: bool = False,
) -> tuple[Tensor, Tensor]:
    """Eq. 13; sizes move by the shares of their source."""
    total = [tokens[j].double().clone() for j in target]
    weight = [1.0] * len(target)
    mass = [float(size[j]) for j in target]
    for row, i in zip(correlation, source, strict=True):
        if fixed_k is None:
            chosen = [j for j, value in enumerate(row) if value >= quantile(row, epsilon)]
        else:
            chosen = sorted(range(len(row)), key=lambda j: (-row[j], j))[:fixed_k]
        chosen = [j for j in chosen if row[j] > 0]
        norm = sum(row[j] for j in chosen)
        for j in chosen:
            alpha = 1.0 if average else row[j] / norm
            total[j] += alpha * tokens[i].double()
            weight[j] += alpha
            mass[j] += float(size[i]) * (1 / len(chosen) if average else row[j] / norm)
    return torch.stack([t / w for t, w in zip(total, weight, strict=True)]), torch.tensor(mass)


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two vectors in float64."""
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


def place(values: list[float]) -> list[int]:
    """Place of each value from the highest, the first of equals higher."""
    order = sorted(range(len(values)), key=lambda index: (-values[index], index))
    return [order.index(index) for index in range(len(values))]


def mean_of_nearest(
    tokens: Tensor, source: list[int], target: list[int], likeness: list[list[float]], allowed: list[int]
) -> Tensor:
    """Each source joins the most similar of the allowed targets; every target becomes the mean of its group."""
    groups: dict[int, list[int]] = {j: [j] for j in target}
    for row, i in zip(likeness, source, strict=True):
        best = max(allowed, key=lambda j: (row[target.index(j)], -j))
        groups[best].append(i)
    return torch.stack([tokens[groups[j]].double().mean(dim=0) for j in target])


def takers(likeness: list[list[float]], count: int) -> dict[int, list[int]]:
    """For each source that any target takes: the targets that have it among their `count` most similar ones."""
    taken: dict[int, list[int]] = {}
    for column in range(len(likeness[0])):
        for index in sorted(range(len(likeness)), key=lambda index: -likeness[index][column])[:count]:
            taken.setdefault(index, []).append(column)
    return taken


def add_neighbours(
    tokens: Tensor,
    source: list[int],
    target: list[int],
    likeness: list[list[float]],
    weight: list[float],
    count: int,
    allowed: list[int],
) -> Tensor:
    """Each allowed target receives its `count` most similar sources, times their weight."""
    result = []
    for column, j in enumerate(target):
        row = tokens[j].double().clone()
        if j in allowed:
            nearest = sorted(range(len(source)), key=lambda index: -likeness[index][column])[:count]
            for index in nearest:
                row += weight[source[index]] * tokens[source[index]].double()
        result.append(row)
    return torch.stack(result)
