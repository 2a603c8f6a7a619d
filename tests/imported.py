"""What the server of `programs` imports before it forks: every module that a script may want, and their libraries."""

import importlib
import pkgutil
from pathlib import Path

import sklearn.datasets  # noqa: F401  (the digits)
import torch._dynamo  # noqa: F401  (imported by the first optimizer, in more time than a short run takes)

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ('dnnlib', 'torch_utils', 'data', 'metrics', 'sampling', 'training', 'experiments')

for room in ROOMS:
    importlib.import_module(room)
    for module in pkgutil.walk_packages([str(ROOT / room)], f'{room}.'):
        importlib.import_module(module.name)
