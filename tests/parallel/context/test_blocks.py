"""Attention to blocks of keys, joined, is attention to all of them; so are the gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainfleet.parallel.context import blocks
from trainfleet.parallel.context.blocks import attend, attend_backward, join


@pytest.mark.parametrize("most_scores", [1 << 24, 100], ids=["at once", "in rows"])
@pytest.mark.parametrize("masked", [False, True], ids=["by torch's kernel", "written out"])
def test_joined_blocks_give_attention_to_all_keys(
    monkeypatch: pytest.MonkeyPatch, most_scores: int, masked: bool
) -> None:
    monkeypatch.setattr(blocks, "_MOST_SCORES", most_scores)
    q, k, v = (torch.randn(2, heads, 10, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    mask = torch.rand(2, 1, 10, 10) > 0.3 if masked else None
    if mask is not None:
        mask[0, 0, 3], mask[1, 0, 5, :6] = False, False  # nothing to see at all, and none of the first block
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.4, enable_gqa=True)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    parts = [slice(0, 6), slice(6, 10)]
    with torch.no_grad():
        masks = [None if mask is None else mask[..., part] for part in parts]
        found = [attend(q, k[:, :, part], v[:, :, part], m, False, 0.4) for part, m in zip(parts, masks)]
        out, lse = join(*found[0], *found[1])
        torch.testing.assert_close(out, expected)
        gradients = [
            attend_backward(grad, q, k[:, :, part], v[:, :, part], out, lse, m, False, 0.4)
            for part, m in zip(parts, masks)
        ]
    torch.testing.assert_close(gradients[0][0] + gradients[1][0], q.grad)
    for i, tensor in ((1, k), (2, v)):
        torch.testing.assert_close(torch.cat([each[i] for each in gradients], -2), tensor.grad)


def test_a_causal_block_written_out_is_that_of_the_kernel() -> None:
    q, k, v = (torch.randn(2, 3, 7, 4, dtype=torch.float64) for _ in range(3))
    by_kernel = attend(q, k, v, None, True, 0.5)
    written_out = attend(q, k, v, torch.ones(7, 7, dtype=torch.bool), True, 0.5)
    for one, other in zip(by_kernel, written_out, strict=True):
        torch.testing.assert_close(one, other)
