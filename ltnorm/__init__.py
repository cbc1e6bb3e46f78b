"""ltnorm: does the choice of normalization layer help the rare classes?

The submodules are imported on first use, so that `import ltnorm` costs nothing and the
commands that need no torch never load it.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"

__all__ = ["data", "losses", "models", "norms", "recipe", "registry"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"ltnorm.{name}")
    raise AttributeError(f"module 'ltnorm' has no attribute {name!r}")
