"""NumPy, imported when something of it is used.

Running a model needs none of it unless it samples or gives logits away, and importing it would be a third of
the time to the first token. Modules on that way take ``np`` from here, and leave it alone while they are
imported.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["np"]


class _Lazy(ModuleType):
    """Stands for a module; what was asked for once is found at once."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        self.__dict__[name] = value
        return value


if not TYPE_CHECKING:
    np = _Lazy("numpy")
