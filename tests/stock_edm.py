"""What EDM's own tools do with a snapshot, reduced to its essence, in a process that has nothing of ours."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

# Run the source that comes along, once, with a decorator that subclasses; make the object without its
# constructor; give it its state.
STAND_IN = """
import sys, types
modules = {}

def persistent_class(cls):
    if getattr(cls, 'persistent', False) and 'persistent' in vars(cls):
        return cls
    class Decorated(cls):
        persistent = True
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._init_args, self._init_kwargs = args, kwargs
    Decorated.__name__ = cls.__name__
    return Decorated

def _reconstruct_persistent_obj(meta):
    assert meta['type'] == 'class' and meta['version'] == 6
    source = meta['module_src']
    if source not in modules:
        modules[source] = types.ModuleType(f'embedded_{len(modules)}')
        sys.modules[modules[source].__name__] = modules[source]
        exec(source, vars(modules[source]))
    cls = persistent_class(getattr(modules[source], meta['class_name']))
    obj = cls.__new__(cls)
    obj.__setstate__(meta['state'])
    return obj
"""

STOCK_SCRIPT = """
import importlib.util, pathlib, pickle, sys
# Not even where pip has installed this repository in place.
sys.meta_path[:] = [finder for finder in sys.meta_path if '__editable__' not in getattr(finder, '__module__', '')]
import numpy as np, torch
assert importlib.util.find_spec('training') is None and importlib.util.find_spec('dnnlib') is None
given = {name: torch.as_tensor(value) for name, value in np.load('given.npz').items()}
for path in pathlib.Path().glob('*.pkl'):
    data = pickle.loads(path.read_bytes())
    assert data['loss_fn'] is None and data['augment_pipe'] is None
    net = data['ema']
    assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())
    assert type(net).__module__.startswith('embedded') or type(net).__module__ == 'torch_utils.persistence'
    np.save(path.with_suffix('.npy'), net(given['x'], given['sigma'], given['labels']).numpy())
"""


def assert_stock_edm_agrees(folder: Path, nets: dict, given: dict, tolerance: float = 1e-6) -> None:
    """EDM's way of loading gives the networks of the snapshots `<name>.pkl` in a folder the same outputs.

    Args:
        nets: the networks by the name of their snapshot.
        given: `x`, `sigma` and `labels` to evaluate them at.
        tolerance: largest difference, in units of the outputs' deviation.
    """
    (folder / 'torch_utils').mkdir()
    (folder / 'torch_utils' / '__init__.py').touch()
    (folder / 'torch_utils' / 'persistence.py').write_text(STAND_IN)
    (folder / 'script.py').write_text(STOCK_SCRIPT)
    np.savez(folder / 'given.npz', **{name: value.numpy() for name, value in given.items()})
    env = {**os.environ, 'PYTHONPATH': str(folder)}
    subprocess.run([sys.executable, 'script.py'], cwd=folder, env=env, check=True, timeout=120)
    for name, net in nets.items():
        with torch.no_grad():
            expected = net.eval()(given['x'], given['sigma'], given['labels']).numpy()
        np.testing.assert_allclose(
            np.load(folder / f'{name}.npy'), expected, rtol=0, atol=tolerance * expected.std()
        )
