"""EDM's persistent objects: a pickled object carries the source of the module that defines its class.

Format (version 6, as in Karras et al.'s StyleGAN and EDM code): the object is pickled as a call of
`torch_utils.persistence._reconstruct_persistent_obj` with one dict: type 'class', version, module_src,
class_name, state. EDM's own tools execute module_src to rebuild the object. This module only writes that
source and never executes any: `training.checkpoint` reads snapshots as data, and plain unpickling works only
for classes that this process defines itself.
"""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import sys

FORMAT_VERSION = 6
# Attributes of how this process runs an object, which pickles and copies leave out.
HERE_ONLY = {'_compiled_call_impl', 'channels_last', 'checkpoint_activations', 'forces_unit_weights'}
_classes: dict[tuple[str, str], type] = {}  # (class name, source of its module) -> class
_sources: dict[type, str] = {}


def persistent_class(cls: type) -> type:
    """Class decorator: objects record their constructor arguments and pickle in EDM's format, with source.

    Adds the properties `init_args` (tuple) and `init_kwargs` (dict), the arguments of the outermost
    constructor; an argument that is a persistent object is recorded as dict(class_name, args, kwargs). Copies
    keep an attribute `metadata`, and pickles leave it out. Both leave out `HERE_ONLY`.

    Raises: OSError if the module's source is not readable, as in interactive sessions.
    """
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self, *args, **kwargs):
        # Constructors of base classes run inside the outermost one, whose arguments are recorded.
        if type(self) is not cls:
            construct(self, *args, **kwargs)
            return
        # Copy the arguments first: the constructor may alter them.
        recorded_args = tuple(map(_recorded, args))
        recorded_kwargs = {name: _recorded(value) for name, value in kwargs.items()}
        construct(self, *args, **kwargs)
        self._init_args, self._init_kwargs = recorded_args, recorded_kwargs

    cls.__init__ = __init__
    cls.init_args = property(lambda self: copy.deepcopy(self._init_args))
    cls.init_kwargs = property(lambda self: copy.deepcopy(self._init_kwargs))
    cls.__reduce__ = _reduce
    cls.__deepcopy__ = _deepcopy
    # Intern the source, so that a pickle has one copy per module.
    _sources[cls] = sys.intern(inspect.getsource(sys.modules[cls.__module__]))
    _classes[cls.__name__, _sources[cls]] = cls
    return cls


def _recorded(argument):
    """A copy of a constructor argument, without the weights of a persistent object."""
    if type(argument) in _sources:
        return dict(class_name=type(argument).__name__, args=argument.init_args, kwargs=argument.init_kwargs)
    return copy.deepcopy(argument)


def _state(obj, leave_out: set[str]) -> dict:
    return {name: value for name, value in vars(obj).items() if name not in leave_out}


def _restore(obj, state: dict):
    """Give a bare object its state, by `__setstate__` if the class has it, as torch modules do."""
    setstate = getattr(obj, '__setstate__', vars(obj).update)
    setstate(state)
    return obj


def _reduce(self):
    cls = type(self)
    if cls not in _sources:
        raise TypeError(
            f'{cls.__name__} derives from a persistent class but is not decorated with @persistent_class '
            'itself'
        )
    state = _state(self, leave_out={'metadata'} | HERE_ONLY)
    meta = dict(
        type='class', version=FORMAT_VERSION, module_src=_sources[cls], class_name=cls.__name__, state=state
    )
    return _reconstruct_persistent_obj, (meta,)


def _deepcopy(self, memo: dict):
    """Copy the state only. The generic way, by `_reduce`, would lose `metadata`."""
    # In the memo first, because its state may refer to it.
    twin = memo[id(self)] = type(self).__new__(type(self))
    return _restore(twin, copy.deepcopy(_state(self, leave_out=HERE_ONLY), memo))


def _reconstruct_persistent_obj(meta: dict):
    """Called by pickles. Rebuilds objects of this process's classes; never executes the pickled source."""
    cls = _classes.get((meta['class_name'], meta['module_src']))
    if cls is None:
        raise pickle.UnpicklingError(
            f'no class {meta["class_name"]!r} with this source is loaded here, and its source is never '
            'executed; read snapshots with training.checkpoint.load_network'
        )
    return _restore(cls.__new__(cls), meta['state'])
