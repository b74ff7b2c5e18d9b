"""sepcap: find the neurons that a capability of a language model depends on, and measure what is left without them.

The public names are listed in `__init__.pyi` and imported when they are first used, so that `import sepcap` is fast.
"""

from importlib import import_module
from typing import Any

import lazy_loader

__version__ = "0.1.0"

_attribute, _, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sepcap' has no attribute {name!r}; it has {', '.join(__all__)}")
    # before any library that imports tqdm.auto, which warns in notebooks without ipywidgets
    import_module("sepcap.progress")
    return _attribute(name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
