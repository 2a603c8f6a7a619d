"""Import modules on first use, so that `train.py --help` does not wait for PyTorch."""

from __future__ import annotations

import importlib


class LazyModule:
    """Proxy of a module, which the first attribute access imports."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self._name), attribute)


def lazy_import(name: str) -> LazyModule:
    """`torch = lazy_import('torch')` for `import torch`; annotations that use it must stay strings."""
    return LazyModule(name)
