"""Says which setting to lower where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Turn torch's errors about memory into a MemoryError of one sentence that ends in `advice`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        # torch's message is a paragraph whose first sentences say how much was wanted and is free.
        wanted = ". ".join(str(error).split(". ")[1:3])
        about = f" ({wanted})" if wanted else ""
        raise MemoryError(f"out of GPU memory{about}; {advice}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise MemoryError(
            f"out of memory ({str(error).rsplit(':', 1)[-1].strip()}); {advice}"
        ) from error
