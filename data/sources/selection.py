"""A source of images, and the choice of some of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import click

from data.image_files import Unreadable
from data.pixels import Picture
from dnnlib import UserError
from dnnlib.text import printable

SHOWN = 5  # names in a message
Label = int | list[float] | None
T = TypeVar('T')


class Item(NamedTuple):
    """An image of a source: index, name for messages, pixels, and label (class index, vector or None).

    `picture` is the error instead, for an image that cannot be read, if the selection allows such.
    """

    number: int
    name: str
    picture: Picture | Unreadable
    label: Label


class Source(NamedTuple):
    """A sequence of images to convert.

    Attributes:
        count: number of images.
        mode: 'L' or 'RGB', of all written images.
        items: the images in order.
        vectors: labels are vectors, even if the selected ones look one-hot.
        class_names: names of the classes by index, if they are known.
    """

    count: int
    mode: str
    items: Iterable[Item]
    vectors: bool = False
    class_names: Sequence[str] | None = None


class Selection(NamedTuple):
    """Which images of a source to convert, and with which labels.

    Attributes:
        max_images: keep the first N; None keeps all.
        max_per_class: keep the first N of each class; None keeps all.
        labels_from: auto | folders | dataset.json | none.
        skip_bad: skip images that cannot be read, instead of raising an error.
    """

    max_images: int | None = None
    max_per_class: int | None = None
    labels_from: str = 'auto'
    skip_bad: bool = False

    def rows(
        self, labels: Sequence[Label] | None, count: int, names: Sequence[str] | None = None
    ) -> Sequence[int]:
        """Sorted indices of the selected images among `count`. Prints a note about classes left out.

        Args:
            names: of the classes, by index.
        """
        # Limit each class, then the total.
        rows: Sequence[int] = range(count)
        classes = Counter(labels) if labels is not None and count and isinstance(labels[0], int) else None
        if self.max_per_class is not None:
            if classes is None:
                raise UserError(
                    '--max-images-per-class needs class labels, and the source has none; use --max-images'
                )
            if few := [label for label, number in classes.items() if number < self.max_per_class]:
                note(
                    f'{listed(few, names)}: {len(few)} of {len(classes)} classes have fewer than '
                    f'{self.max_per_class} images.'
                )
            rows = first_of_each(labels, self.max_per_class)
        rows = rows[: self.max_images]

        # Classes without any image are likely a mistake: sorted sources begin with the first classes only.
        if classes is not None and (left_out := classes.keys() - {labels[i] for i in rows}):
            note(
                f'--max-images={self.max_images} leaves out {len(left_out)} of {len(classes)} classes '
                f'({listed(left_out, names)}); --max-images-per-class takes as many of each.'
            )
        return rows

    def read(self, read: Callable[[], T]) -> T | Unreadable:
        """`read()`, or with `skip_bad` the error that it raises. Raises: UserError, naming --skip-bad."""
        try:
            return read()
        except Unreadable as error:
            if not self.skip_bad:
                raise UserError(f'{error}, or skip such images with --skip-bad') from error
            return error

    def refuse_label_files(self, name: str) -> None:
        """Raises: UserError if labels are to come from files, which the source `name` does not have."""
        if self.labels_from in ('folders', 'dataset.json'):
            raise UserError(
                f'--labels-from={self.labels_from} is for folders and zips of images, not for {name}; leave '
                'it out'
            )


def first_of_each(labels: Sequence[int], count: int) -> list[int]:
    """Sorted indices of the first `count` occurrences of each label."""
    seen, rows = Counter(), []
    for i, label in enumerate(labels):
        if seen[label] < count:
            seen[label] += 1
            rows.append(i)
    return rows


def note(text: str) -> None:
    click.echo(f'Note: {printable(text)}', err=True)


def listed(values: Iterable, names: Sequence[str] | None = None) -> str:
    """The first sorted values, as 'name=value' if there are names by value."""
    values = sorted(values)
    shown = ', '.join(str(value) if names is None else f'{names[value]}={value}' for value in values[:SHOWN])
    return shown + (', ...' if len(values) > SHOWN else '')
