"""Crops of scikit-learn's two sample photographs: a small real data set in color, without a download."""

from __future__ import annotations

import os
import pathlib

import numpy as np
from PIL import Image

from data.pixels import Picture
from data.sources.selection import Item, Selection, Source
from dnnlib import UserError

NAME = 'photos'
CLASSES = ('china', 'flower')  # names of the photographs
WIDTH, HEIGHT = 640, 427  # of each
SIDES = (32, 48, 64, 96)  # of square crops, in pixels of the photograph
# Columns of the band of each photograph that test crops are from; training crops are from either side of it,
# so that no pixel is in both. Of all bands of 128 columns (in steps of 32) these have the crops closest to the
# others, by the Fréchet distance of their pixels in 4x4.
TEST_BANDS = {'china': (0, 128), 'flower': (128, 256)}
COUNTS = {'train': 4000, 'test': 1000}  # crops of each photograph


def photos_source(selection: Selection, split: str, resolution: tuple[int, int] | None) -> Source:
    """Square crops of the two photographs, alternately; their classes are `CLASSES`.

    Every side in `SIDES` that is at least the resolution, so that no crop is enlarged, has the same number of
    crops. Positions are uniform and do not repeat. They depend on the split and these sides only.

    Args:
        split: key of `COUNTS`.
        resolution: the size that crops are resized to.
    Raises: UserError if there is no resolution, or one larger than all crops.
    """
    if resolution is None:
        raise UserError('--source=photos has crops of several sizes: add --resolution, such as 16x16')
    sides = [side for side in SIDES if side >= max(resolution)]
    if not sides:
        raise UserError(
            f'--resolution={resolution[0]}x{resolution[1]}: crops of --source=photos have at most '
            f'{max(SIDES)} pixels a side; choose 64x64 or smaller'
        )
    selection.refuse_label_files(NAME)

    # Choose the crops, then those of the selection; pixels are cut when they are needed.
    photographs = load_photographs()
    boxes = [crop_boxes(name, split, sides) for name in CLASSES]
    classes = [i % len(CLASSES) for i in range(len(CLASSES) * COUNTS[split])]
    labels = None if selection.labels_from == 'none' else classes
    rows = selection.rows(labels, len(classes), CLASSES)
    items = (
        Item(
            i,
            f'{NAME}[{row}]',
            Picture(photographs[classes[row]].crop(boxes[classes[row]][row // len(CLASSES)])),
            None if labels is None else labels[row],
        )
        for i, row in enumerate(rows)
    )
    return Source(len(rows), 'RGB', items, class_names=None if labels is None else CLASSES)


def check_unambiguous(option: str, name: str) -> None:
    """Raises: UserError if the name of a bundled source is also that of a file or folder."""
    if os.path.lexists(name):
        raise UserError(
            f"{option}={name} means scikit-learn's photographs, and there is a file or folder of that name; "
            f'write {option}=./{name} for it, or rename it for the photographs'
        )


def load_photographs() -> list[Image.Image]:
    """The photographs in the order of `CLASSES`, which is scikit-learn's."""
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    by_name = {pathlib.Path(path).stem: image for path, image in zip(found.filenames, found.images)}
    return [Image.fromarray(by_name[name]) for name in CLASSES]


def crop_boxes(name: str, split: str, sides: list[int]) -> list[tuple[int, int, int, int]]:
    """`COUNTS[split]` different boxes (left, top, right, bottom) of a photograph, in a random order."""
    # RandomState has the same stream in every version of NumPy.
    rng = np.random.RandomState(CLASSES.index(name))
    first, end = TEST_BANDS[name]
    columns = [(first, end)] if split == 'test' else [(0, first), (end, WIDTH)]
    boxes = []
    for side in sides:
        # All positions inside these columns, by number.
        lefts = [left for first, end in columns for left in range(first, end - side + 1)]
        tops = HEIGHT - side + 1
        for position in rng.permutation(len(lefts) * tops)[: COUNTS[split] // len(sides)].tolist():
            left, top = lefts[position // tops], position % tops
            boxes.append((left, top, left + side, top + side))
    return [boxes[i] for i in rng.permutation(len(boxes))]
