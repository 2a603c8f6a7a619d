"""Modules that are imported when they are first used, so that `train.py --help` does not wait for PyTorch."""

from __future__ import annotations

import importlib


class LazyModule:
    """Stands for a module; the first attribute that is looked up imports it."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self._name), attribute)


def lazy_import(name: str) -> LazyModule:
    """`torch = lazy_import('torch')` instead of `import torch`, at the top of a file. Annotations that name
    it stay strings."""
    return LazyModule(name)
