"""Multiply-accumulates of anything that runs on torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(function: Callable[[], object]) -> int:
    """Run `function` once and count the multiply-accumulates of its matrix products, convolutions, attention.

    torch's counter gives two operations for each. It misses the fast path of `nn.MultiheadAttention` and, in
    some versions, the fused attention of the CPU, so the matrix products that these stand for run instead.

    Args:
        function: called without arguments; what it returns is thrown away.

    Returns:
        Multiply-accumulates.

    Example:
        >>> attention = torch.nn.MultiheadAttention(8, num_heads=2, batch_first=True).eval()
        >>> tokens = torch.zeros(1, 5, 8)
        >>> with torch.no_grad():  # q, k, v: 960, logits: 200, weighted values: 200, output: 320
        ...     count_macs(lambda: attention(tokens, tokens, tokens, need_weights=False))
        1680
    """
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            function()
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
    return counter.get_total_flops() // 2
