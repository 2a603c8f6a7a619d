"""Folders and zips of image files."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

import numpy as np

from data.image_files import ImageFiles, NoImages
from data.label_file import are_label_vectors, count_unused_labels, read_class_names, read_labels
from data.label_space import Labels
from data.pixels import IMAGE_EXTENSIONS, Picture, is_color
from data.sources.class_folders import folder_labels
from data.sources.selection import Item, Label, Selection, Source, note
from dnnlib import UserError


def files_source(path: pathlib.Path, selection: Selection, background: tuple[int, int, int]) -> Source:
    """A folder or zip of images, sorted by name; RGB if any image is in color."""
    try:
        files = ImageFiles(path)
    except NoImages as error:
        endings = ', '.join(sorted(IMAGE_EXTENSIONS))
        raise UserError(
            f'--source={str(error).partition(";")[0]}: check the path. Images end in {endings}; folders '
            'may be nested.'
        ) from error
    if files.holds_latents:
        with files.open_latents(files.images[0]):  # raises an error of its own for other arrays
            pass
        raise UserError(
            f'{path} already holds latents ({files.images[0]}, ...); use it as it is, or name the images '
            'they were made from'
        )

    # Choose images. `any` reads few headers: the first image in color decides.
    names, labels, classes = labeled_images(files, selection.labels_from)
    rows = selection.rows(labels, len(names), classes)
    mode = 'RGB' if any(_is_color(files, names[row], background, selection) for row in rows) else 'L'
    items = (
        Item(
            i,
            f'{path}: {names[row]}',
            selection.read(functools.partial(_read, files, names[row])),
            None if labels is None else labels[row],
        )
        for i, row in enumerate(rows)
    )

    # Labels are vectors if any is, selected or not.
    vectors = (
        bool(labels)
        and isinstance(labels[0], list)
        and Labels.of_data(np.array(labels), are_label_vectors(files)).are_vectors
    )
    if about := files.about_others():
        note(f'{about}.')
    return Source(len(rows), mode, items, vectors, classes)


def labeled_images(
    files: ImageFiles, labels_from: str
) -> tuple[Sequence[str], list[Label] | None, list[str] | None]:
    """(image names, labels or None, class names or None) for a `Selection.labels_from`."""
    if labels_from == 'none':
        return files.images, None, None
    # A label file takes precedence over folders.
    if labels_from == 'dataset.json' or (labels_from == 'auto' and files.label_files):
        labels = read_labels(files)
        if labels is None and labels_from == 'dataset.json':
            raise UserError(f'{files.path} has no dataset.json with labels; leave out --labels-from')
        if unused := count_unused_labels(files):
            note(f'{unused} labels in dataset.json have no image in {files.path}. Is it complete?')
        return files.images, None if labels is None else labels.tolist(), read_class_names(files)
    by_folder = folder_labels(files, leave_out=labels_from == 'folders')
    if by_folder is None and labels_from == 'folders':
        raise UserError(f'{files.path} has no class folders; leave out --labels-from')
    return by_folder or (files.images, None, None)


def _is_color(files: ImageFiles, name: str, background: tuple[int, int, int], selection: Selection) -> bool:
    """Whether an image is in color, by its header; False for one that is skipped."""

    def by_header() -> bool:
        with files.open_image(name) as image:
            return is_color(image, background)

    return selection.read(by_header) is True


def _read(files: ImageFiles, name: str) -> Picture:
    with files.open_image(name) as image:
        return Picture.load(image)
