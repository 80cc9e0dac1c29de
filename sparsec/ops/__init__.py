"""The `torch.library` ops that compiled graphs call; importing this registers them."""

from sparsec.ops import linear, prepacked

__all__ = ["linear", "prepacked"]
