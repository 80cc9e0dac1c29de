"""The `torch.library` ops that compiled graphs call; importing this registers them."""

from sparsec.ops import conv, linear, prepacked, stream

__all__ = ["conv", "linear", "prepacked", "stream"]
