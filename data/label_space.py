"""Labels of a data set or network: classes, some of which may lack images, or vectors of numbers.

A network sees float32 [label_dim]: one-hot for a class, else the vector in `dataset.json`. A data set whose
vectors are all one-hot has classes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dnnlib import UserError
from dnnlib.text import as_ranges

KINDS = ('classes', 'vectors')
SHOWN = 10  # ranges of classes listed in a message


class LabelSpace(NamedTuple):
    """The labels that a network accepts.

    Attributes:
        dim: length of a label; 0 without labels.
        kind: 'classes' or 'vectors'; None if unknown, as in snapshots of other programs.
        present: sorted classes with images in the training set; None if all have some, or unknown.
        names: of all classes, for messages; None if unknown, as in snapshots.
    """

    dim: int
    kind: str | None = None
    present: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None

    @property
    def are_vectors(self) -> bool:
        return self.kind == 'vectors'

    @property
    def with_images(self) -> Sequence[int]:
        """The classes with images, sorted."""
        return range(self.dim) if self.present is None else self.present

    @property
    def absent(self) -> list[int]:
        """The classes without images."""
        present = set(self.with_images)
        return [k for k in range(self.dim) if k not in present]

    def differs(self, other: LabelSpace) -> bool:
        """Whether a label of one space cannot belong to the other."""
        return self.dim != other.dim or (None not in (self.kind, other.kind) and self.kind != other.kind)

    def __str__(self) -> str:
        if self.are_vectors:
            return f'label vectors of {self.dim} numbers'
        names = f' ({self.listed(range(self.dim))})' if self.names else ''
        return f'{self.dim or "no"} class{"es" * (self.dim != 1)}{names}'

    def listed(self, classes: Sequence[int]) -> str:
        """Sorted classes for a message: the first ones as `name=index`, or ranges if there are no names."""
        if self.names is None:
            return listed(classes)
        shown = ', '.join(f'{self.names[k]}={k}' for k in classes[:SHOWN])
        return shown + (f', ... ({len(classes)} in all)' if len(classes) > SHOWN else '')

    def warning(self) -> str | None:
        """A warning about classes without images; None if there are none."""
        if not (absent := self.absent):
            return None
        have, them = ('has', 'It is') if len(absent) == 1 else ('have', 'They are')
        return (
            f'{len(absent)} of {self.dim} classes {have} no images: {self.listed(absent)}. {them} not '
            'trained and never sampled.'
        )

    def check_class(self, class_idx: int, option: str, network: str) -> None:
        """Raises: UserError, prefixed by `option`, unless the network was trained on images of the class."""
        if self.are_vectors:
            raise UserError(
                f'{option}: {network} takes {self}, not classes: give --labels=data, or --labels=FILE.npy '
                'with vectors'
            )
        if class_idx >= self.dim:
            raise UserError(f'{option} does not exist: {network} has {self.dim or "no"} classes')
        if self.present is not None and class_idx not in self.present:
            raise UserError(
                f'{option}: the training set of {network} has no images of class {class_idx}, so it was '
                f'never trained; the classes with images are {listed(self.present)}'
            )

    def record(self) -> dict:
        """Metadata: `label_kind` and, if some lack images, `classes` that have images, such as '0-2,5'."""
        return {
            **({'label_kind': self.kind} if self.kind else {}),
            **({} if self.present is None else {'classes': as_ranges(self.present)}),
        }

    @classmethod
    def recorded(cls, dim: int, record: dict) -> LabelSpace:
        """Inverse of `record`, from metadata that contains it. Raises: ValueError for a malformed record."""
        kind, classes = record.get('label_kind'), record.get('classes')
        if kind not in (None, *KINDS) or (
            classes is not None and (kind == 'vectors' or not isinstance(classes, str))
        ):
            raise ValueError(f'labels of the kind {kind!r}')
        return cls(dim, kind, None if classes is None else parse_ranges(classes, dim))


def space_of(net) -> LabelSpace:
    """Labels of a loaded network, from its metadata."""
    return LabelSpace.recorded(net.label_dim, getattr(net, 'metadata', {}))


def parse_ranges(text: str, limit: int) -> tuple[int, ...]:
    """Inverse of `ranges`. Raises: ValueError for any other text, or numbers not below `limit`."""
    if not re.fullmatch(r'\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*', text, re.ASCII):
        raise ValueError(f'classes {text[:40]!r}')
    numbers, free = [], 0  # free: the least number that may follow
    for part in text.split(','):
        first, _, last = part.partition('-')
        first, last = int(first), int(last or first)
        if not free <= first <= last < limit:
            raise ValueError(f'classes {part!r} are unsorted or not below {limit}')
        numbers.extend(range(first, last + 1))
        free = last + 1
    return tuple(numbers)


def listed(numbers: Sequence[int]) -> str:
    """Sorted numbers for a message: the first ranges."""
    parts = as_ranges(numbers).split(',')
    return ', '.join(parts[:SHOWN]) + (f', ... ({len(numbers)} in all)' if len(parts) > SHOWN else '')


# ----------------------------------------------------------------------------
# Sequences of labels.


class Labels(Sequence):
    """Sequence of labels as a network sees them: float32 [dim] each.

    Attributes:
        values: [N] int64 class indices, or [N, dim] float32 vectors.
        space: the labels' space.
    """

    def __init__(self, values: np.ndarray, space: LabelSpace):
        self.values, self.space = values, space

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> np.ndarray:
        # One-hot labels are made on demand: a million of them with 1000 classes would take 4 GB.
        label = self.values[i]
        return np.array(label) if label.ndim else (np.arange(self.space.dim) == label).astype(np.float32)

    @property
    def are_vectors(self) -> bool:
        return self.values.ndim == 2

    def digest(self) -> str:
        """SHA-256 of the values."""
        digest = hashlib.sha256(
            f'{self.values.dtype.str} {list(self.values.shape)} {self.space.dim}\n'.encode()
        )
        digest.update(np.ascontiguousarray(self.values))
        return digest.hexdigest()

    @classmethod
    def of_data(
        cls, values: np.ndarray, vectors: bool = False, class_names: Sequence[str] | None = None
    ) -> Labels:
        """All labels of a data set, from `read_labels`; `vectors` declares them vectors even if one-hot.

        Args:
            class_names: of the classes by index, possibly of further ones.
        """
        # One-hot rows are classes, unless the data set declares otherwise.
        if values.ndim == 2 and (vectors or not are_one_hot(values)):
            return cls(values, LabelSpace(values.shape[1], 'vectors'))
        dim, indices = (
            (values.shape[1], values.argmax(axis=1)) if values.ndim == 2 else (int(values.max()) + 1, values)
        )
        names = None if class_names is None else tuple(class_names[:dim])
        return cls(indices, LabelSpace(dim, 'classes', _present(indices, dim), names))

    def subset(self, index: np.ndarray) -> Labels:
        """The labels at `index`; classes that lose all images become absent."""
        values = self.values[index]
        return Labels(
            values,
            self.space if self.are_vectors else self.space._replace(present=_present(values, self.space.dim)),
        )

    @classmethod
    def checked(cls, values: np.ndarray, space: LabelSpace, source: str, network: str) -> Labels:
        """Labels for a network from [N] class indices or [N, dim] vectors of a file or data set.

        Raises: UserError, naming `source`, if the network does not accept them.
        """
        # What the network accepts, for messages.
        wanted = f'{network} takes {space}: ' + ' or '.join(
            [f'class indices [N] below {space.dim}', f'one-hot rows [N, {space.dim}]'][
                : 0 if space.are_vectors else 2
            ]
            + [f'vectors [N, {space.dim}] of finite numbers'][: 0 if space.kind == 'classes' else 1]
        )

        # Class indices.
        if values.dtype.kind not in 'iuf' or values.size == 0:
            raise UserError(f'{source} holds {values.dtype} {list(values.shape)}, not labels; {wanted}')
        are_indices = values.ndim == 1 and values.dtype.kind != 'f' and not space.are_vectors
        if not are_indices and not (values.ndim == 2 and values.shape[1] == space.dim):
            raise UserError(f'{source} holds {values.dtype} {list(values.shape)}; {wanted}')
        if are_indices:
            return cls(_checked_classes(values, space, source, network), space)

        # Rows, which are vectors or one-hot.
        with np.errstate(over='ignore'):
            vectors = np.asarray(values, dtype=np.float32)
        if bad := int((~np.isfinite(vectors).all(axis=1)).sum()):
            raise UserError(
                f'{source}: {bad} of {len(vectors)} rows hold numbers that are not finite in float32'
            )
        one_hot = not space.are_vectors and are_one_hot(vectors)
        if space.kind == 'classes' and not one_hot:
            raise UserError(f'{source} holds rows that are not one-hot; {wanted}')
        return cls(
            _checked_classes(vectors.argmax(axis=1), space, source, network) if one_hot else vectors, space
        )


def are_one_hot(rows: np.ndarray) -> bool:
    """Whether every row of [N, D] has one 1 and zeros elsewhere."""
    return bool(((rows == 0) | (rows == 1)).all() and (rows.sum(axis=1) == 1).all())


def _present(indices: np.ndarray, dim: int) -> tuple[int, ...] | None:
    present = np.unique(indices)
    return None if len(present) == dim else tuple(present.tolist())


def _checked_classes(indices: np.ndarray, space: LabelSpace, source: str, network: str) -> np.ndarray:
    # A class without training images has an embedding that was never trained.
    used = np.unique(indices).tolist()
    if not 0 <= used[0] <= used[-1] < space.dim:
        raise UserError(
            f'{source} holds class indices from {used[0]} to {used[-1]}, but {network} has {space.dim} '
            f'classes, 0 to {space.dim - 1}'
        )
    if space.present is not None and (untrained := sorted(set(used) - set(space.present))):
        raise UserError(
            f'{source} holds labels of classes {listed(untrained)}, of which the training set of {network} '
            f'has no images, so they were never trained; the classes with images are {listed(space.present)}'
        )
    return indices.astype(np.int64)
