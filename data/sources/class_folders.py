"""Class labels from the folders that images are in."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import click

from data import file_names
from data.image_files import ImageFiles
from data.sources.selection import listed, note
from dnnlib import UserError
from dnnlib.text import printable


class ClassFolders(NamedTuple):
    """Assignment of images to class folders.

    Attributes:
        prefix: path to the class folders: empty, or ends in a slash.
        names: sorted names of the class folders.
        labels: index into `names` for each image; None for an image outside of class folders.
    """

    prefix: str
    names: list[str]
    labels: list[int | None]


def class_folders(images: Sequence[str]) -> ClassFolders | None:
    """Classes by the outermost folders that differ between images; None if all images are in the root.

    Images beside folders with images have no class. If all images are in one folder, it is the only class.
    """
    by_folder = defaultdict(list)
    for i, name in enumerate(images):
        by_folder[tuple(name.split('/')[:-1])].append(i)

    # Descend to the folder where class folders begin, leaving out images on the way.
    folders = set(by_folder)
    prefix = _common(folders)
    while prefix in folders and len(folders) > 1:
        folders.remove(prefix)
        prefix = _common(folders)
    # If all images are in one folder, that folder is the class.
    depth = len(prefix) - 1 if folders == {prefix} else len(prefix)
    if depth < 0:
        return None

    # Number the class folders in sorted order.
    names = sorted({folder[depth] for folder in folders})
    index, labels = {name: i for i, name in enumerate(names)}, [None] * len(images)
    for folder in folders:
        for i in by_folder[folder]:
            labels[i] = index[folder[depth]]
    return ClassFolders(''.join(f'{part}/' for part in prefix[:depth]), names, labels)


def _common(folders: set[tuple[str, ...]]) -> tuple[str, ...]:
    """Longest common prefix of the folders, each a tuple of names."""
    # In sorted order, what the first and the last share, all share.
    pairs = zip(min(folders), max(folders))
    return tuple(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def folder_labels(files: ImageFiles, leave_out: bool) -> tuple[list[str], list[int], list[str]] | None:
    """(image names, class indices, class names) by class folders; None without folders.

    Args:
        leave_out: skip images outside of class folders; otherwise they are an error.
    """
    found = class_folders(files.images)
    if found is None:
        return None

    # Images outside of class folders have no label.
    if strays := [name for name, label in zip(files.images, found.labels) if label is None]:
        where = (
            f'{len(strays)} of {len(files.images)} images in {files.path} are outside of class folders '
            f'({listed(strays)})'
        )
        if not leave_out:
            raise UserError(
                f'{where} and have no label. Skip them with --labels-from=folders, write all images without '
                'labels with --labels-from=none, or move them.'
            )
        note(f'{where} and are skipped.')
    _check_class_names(files, found)

    # Tell the user what the classes are.
    shown = ', '.join(f'{name}={i}' for i, name in enumerate(found.names[:10]))
    shown += ', ...' if len(found.names) > 10 else ''
    click.echo(printable(f'Labels from {len(found.names)} class folders: {shown}'), err=True)
    pairs = [(name, label) for name, label in zip(files.images, found.labels) if label is not None]
    return [name for name, _ in pairs], [label for _, label in pairs], found.names


def _check_class_names(files: ImageFiles, found: ClassFolders) -> None:
    """Refuse class folders that look the same; print a note about similar ones and about empty folders."""
    # Equal names in another Unicode form are an accident; in another case they may be meant.
    for key, alike in (
        (file_names.composed, 'in Unicode normalization only (composed, NFC, against decomposed, NFD)'),
        (str.casefold, 'in case only'),
    ):
        groups = defaultdict(list)
        for name in found.names:
            groups[key(name)].append(name)
        for first, second, *_ in (group for group in groups.values() if len(group) > 1):
            text = f'{files.path}: the class folders {first!a} and {second!a} differ {alike}'
            if key is file_names.composed:
                raise UserError(f'{text}; rename one, or put their images into one folder')
            note(f'{text}; they are two classes.')

    # Empty folders would shift the indices of the classes after them, if they counted.
    if empty := files.folders(found.prefix) - set(found.names):
        note(
            f'{len(empty)} folders beside the class folders in {files.path} hold no images and are not '
            f'classes ({listed(empty)}).'
        )
