"""Parameters whose memory is given back while nobody needs them, and taken again to be filled anew.

The tensors keep their shapes; what they held is gone. (FSDP frees its gathered parameters like
this.)
"""

from __future__ import annotations

from torch import nn


def give_back(model: nn.Module) -> None:
    """Free the memory of all parameters."""
    for parameter in model.parameters():
        parameter.untyped_storage().resize_(0)


def take_back(model: nn.Module) -> None:
    """Allocate it again; the values are whatever lies there."""
    for parameter in model.parameters():
        storage = parameter.untyped_storage()
        if not storage.size():
            storage.resize_(parameter.numel() * parameter.element_size())
