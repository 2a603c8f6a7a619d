"""Sources of dataset_tool.py, as sequences of labeled images."""

from data.sources.arrays import array_source, cifar10_source, digits_source, mnist_source
from data.sources.files import files_source
from data.sources.lsun import lmdb_source
from data.sources.photos import check_unambiguous, photos_source
from data.sources.selection import Item, Label, Selection, Source, note

__all__ = [
    'Item',
    'Label',
    'Selection',
    'Source',
    'array_source',
    'check_unambiguous',
    'cifar10_source',
    'digits_source',
    'files_source',
    'lmdb_source',
    'mnist_source',
    'note',
    'photos_source',
]
