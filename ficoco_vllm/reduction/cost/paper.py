"""The paper's own cost formulas, Eqs. 16 to 19, exactly as printed, and the same savings by algebra.

One layer of width D with an MLP of width H. The linear terms and the attention terms count a multiply-add
once, and the MLP with two matrices: double them, and add a third matrix for Llama, to compare with
`flops.py`. Counts are plain integers; N visual tokens, N^S of them removed, M text tokens.
"""


def layer_flops(num_tokens: int, hidden: int, mlp: int) -> int:
    """Cost of one layer: 4 N D^2 + 2 N^2 D + 2 N D H.

    Args:
        num_tokens: N for Eq. 16, P = N + M for Eq. 17.
        hidden: D.
        mlp: H.

    Returns:
        Multiply-adds of the layer.

    Source: arXiv:2411.17686, Eqs. 16 and 17, first and second lines.
    """
    return 4 * num_tokens * hidden**2 + 2 * num_tokens**2 * hidden + 2 * num_tokens * hidden * mlp


def layer_saving(num_tokens: int, num_removed: int, hidden: int, mlp: int) -> int:
    """Saving of one layer, by algebra: `layer_flops` before minus `layer_flops` after.

    The attention term is 2 (2 N N^S - (N^S)^2) D, with P in the place of N in the decoder.

    Args:
        num_tokens: N in the encoder, P = N + M in the decoder.
        num_removed: N^S.
        hidden: D.
        mlp: H.

    Returns:
        Multiply-adds saved.

    Source: arXiv:2411.17686, Eqs. 16 and 17, first two lines.
    """
    before = layer_flops(num_tokens, hidden, mlp)
    return before - layer_flops(num_tokens - num_removed, hidden, mlp)


def encoder_saving_as_printed(num_tokens: int, num_removed: int, hidden: int, mlp: int) -> int:
    """The saving in the encoder as the paper prints it.

    Deviation: its attention term has N N^S where the difference of the two lines above it gives 2 N N^S, so
    it is 2 N N^S D below `layer_saving`. Use `layer_saving`.

    Args:
        num_tokens: N.
        num_removed: N^S.
        hidden: D.
        mlp: H.

    Returns:
        Multiply-adds saved, as printed.

    Source: arXiv:2411.17686, Eq. 16, third line.
    """
    attention = 2 * (num_tokens * num_removed - num_removed**2) * hidden
    return 4 * num_removed * hidden**2 + attention + 2 * num_removed * hidden * mlp


def decoder_saving_as_printed(num_tokens: int, num_removed: int, hidden: int, mlp: int) -> int:
    """The saving in the decoder as the paper prints it.

    Deviation: it has 2 N N^S where the difference of the two lines above it gives 2 P N^S, so the saved
    attention between removed visual tokens and the M text tokens, 4 M N^S D, is missing. Use `layer_saving`
    with P.

    Args:
        num_tokens: N, visual tokens only, as printed.
        num_removed: N^S.
        hidden: D.
        mlp: H.

    Returns:
        Multiply-adds saved, as printed.

    Source: arXiv:2411.17686, Eq. 17, third line.
    """
    attention = 2 * (2 * num_tokens * num_removed - num_removed**2) * hidden
    return 4 * num_removed * hidden**2 + attention + 2 * num_removed * hidden * mlp


def encoder_overhead(num_tokens: int, num_removed: int, hidden: int) -> int:
    """Cost of one reduction of FiCoCo-V: N^2 + 2 N + N^S (N^T + 2 D + 1) + D, with N^T = N - N^S.

    Args:
        num_tokens: N before the reduction.
        num_removed: N^S.
        hidden: D.

    Returns:
        Operations of the three stages; 0 if nothing is removed, as then none of them runs.

    Source: arXiv:2411.17686, Eq. 18.
    """
    if num_removed == 0:
        return 0
    return num_tokens**2 + 2 * num_tokens + _compress(num_tokens, num_removed, hidden)


def decoder_overhead(num_tokens: int, num_removed: int, hidden: int) -> int:
    """Cost of one reduction of FiCoCo-L: 2 (N^2 + 2 N) + N^S (N^T + 2 D + 1) + D, with N^T = N - N^S.

    The formula has no M, so it omits the N^S M N^T multiply-adds of the indirect correlation (Eq. 15).

    Args:
        num_tokens: N before the reduction.
        num_removed: N^S.
        hidden: D.

    Returns:
        Operations of the three stages; 0 if nothing is removed, as then none of them runs.

    Source: arXiv:2411.17686, Eq. 19.
    """
    if num_removed == 0:
        return 0
    return 2 * (num_tokens**2 + 2 * num_tokens) + _compress(num_tokens, num_removed, hidden)


def _compress(num_tokens: int, num_removed: int, hidden: int) -> int:
    num_targets = num_tokens - num_removed
    return num_removed * (num_targets + 2 * hidden + 1) + hidden
