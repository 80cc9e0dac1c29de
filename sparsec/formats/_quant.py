"""Groups of inputs quantised to few bits with a scale and a minimum each: w = scale * code + minimum, rounded once.

The scale keeps 12 significant bits, so that scale * code is exact in fp32 and a kernel's value is that of `dequantise`
to the last bit, whether or not its compiler fuses the multiplication with the addition.
"""

from __future__ import annotations

import numpy as np
import torch

GROUP = 16  # inputs


def quantise(groups: torch.Tensor, used: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(parameters [n, 2], codes int64 [n, GROUP]) of float groups [n, GROUP] over their entries under `used`.

    Parameters are (scale, minimum) in the dtype of `groups`. Entries that are not used get the nearest code.
    """
    wide = groups.float()
    low = torch.where(used, wide, torch.full_like(wide, float("inf"))).amin(1)
    high = torch.where(used, wide, torch.full_like(wide, float("-inf"))).amax(1)
    low, high = (torch.where(used.any(1), edge, torch.zeros_like(edge)) for edge in (low, high))
    scale = ((high - low) / (2**bits - 1)).contiguous()
    scale = (scale.view(torch.int32) & ~0xFFF).view(torch.float32).to(groups.dtype).float()
    low = low.to(groups.dtype).float()
    codes = ((wide - low[:, None]) / torch.where(scale > 0, scale, torch.ones_like(scale))[:, None]).round()
    codes = torch.where(scale[:, None] > 0, codes, torch.zeros_like(codes)).clamp(0, 2**bits - 1)
    return torch.stack([scale, low], 1).to(groups.dtype), codes.long()


def dequantise(parameters: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The values [n, GROUP] of quantised groups, in the dtype of their parameters."""
    wide = parameters.double()
    values = wide[:, :1] * codes + wide[:, 1:]
    return values.float().to(parameters.dtype)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int16 [n, bits] (uint16 bit patterns): code i of a group is bits i * bits and up of its 16 * bits bits."""
    array = codes.numpy().astype(np.uint64)
    words = np.zeros((array.shape[0], bits), np.uint16)
    for i in range(GROUP):
        word, shift = divmod(i * bits, 16)
        spread = array[:, i] << np.uint64(shift)
        words[:, word] |= (spread & np.uint64(0xFFFF)).astype(np.uint16)
        if word + 1 < bits:
            words[:, word + 1] |= (spread >> np.uint64(16)).astype(np.uint16)
    return torch.from_numpy(words.view(np.int16))


def unpack_bits(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes, int64 [n, GROUP]."""
    array = words.cpu().numpy().view(np.uint16).astype(np.uint64)
    codes = np.zeros((array.shape[0], GROUP), np.int64)
    for i in range(GROUP):
        word, shift = divmod(i * bits, 16)
        pair = array[:, word] | (array[:, word + 1] << np.uint64(16) if word + 1 < bits else np.uint64(0))
        codes[:, i] = (pair >> np.uint64(shift)) & np.uint64(2**bits - 1)
    return torch.from_numpy(codes)
