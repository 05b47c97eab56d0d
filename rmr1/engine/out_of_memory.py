"""Says which setting to lower where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Advised(MemoryError):
    """One that has its sentence already."""


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Turn errors about memory into a MemoryError of one sentence that ends in `advice`: torch's,
    and those of numpy, Python and our own C++.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # torch's message is a paragraph whose first sentences say how much was wanted and is free.
        wanted = ". ".join(str(error).split(". ")[1:3])
        about = f" ({wanted})" if wanted else ""
        raise _Advised(f"out of GPU memory{about}; {advice}") from error
    except MemoryError as error:
        if isinstance(error, _Advised):
            raise
        # C++ says no more than its exception's name.
        known = str(error) not in ("", "std::bad_alloc")
        raise _Advised(f"out of memory{f' ({error})' if known else ''}; {advice}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise _Advised(
            f"out of memory ({str(error).rsplit(':', 1)[-1].strip()}); {advice}"
        ) from error
