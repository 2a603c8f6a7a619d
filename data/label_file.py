"""Labels and the encoder of latents, from `dataset.json`."""

from __future__ import annotations

import json

import numpy as np

from data import file_names
from data.image_files import LABEL_FILE, ImageFiles
from dnnlib import UserError, limits

# A larger class index means a damaged file: its one-hot labels would not fit in memory.
MAX_CLASSES = 1_000_000


def read_labels(files: ImageFiles) -> np.ndarray | None:
    """Labels in the order of `files.images`; None if there is no `dataset.json` or its labels are null.

    `dataset.json` is at the root, or the only one in a subfolder; it names images from the root or from its
    own folder.

    Returns: [N] int64 class indices or [N, D] float32 vectors.
    Raises: UserError if the file is malformed or lacks an image.
    """
    return _label_entries(files).get('labels')


def are_label_vectors(files: ImageFiles) -> bool:
    """Whether `dataset.json` declares vectors, even if they look one-hot. Raises: as `read_labels`."""
    return bool(_label_entries(files).get('vectors', False))


def count_unused_labels(files: ImageFiles) -> int:
    """Number of labels without an image, as in an incomplete copy. Raises: as `read_labels`."""
    return int(_label_entries(files).get('unused', 0))


def read_class_names(files: ImageFiles) -> tuple[str, ...] | None:
    """The `"class_names"` of `dataset.json`, by class; None without them. Raises: as `read_labels`."""
    names = json.loads(str(_label_entries(files).get('class_names', '[]')))
    return tuple(names) or None


def _label_entries(files: ImageFiles) -> dict[str, np.ndarray]:
    """`_labels_by_name`, read once per `files`."""
    if files.label_entries is None:
        # Caches called `labels` are of versions without class names.
        files.label_entries = files.remember('named-labels', lambda: _labels_by_name(files))
    return files.label_entries


def _labels_by_name(files: ImageFiles) -> dict[str, np.ndarray]:
    """`labels`, the number of `unused` ones, whether they are declared `vectors`, and `class_names` as JSON;
    {} without labels."""
    name = _label_file(files)
    if name is None:
        return {}
    table, vectors, class_names = _read_label_table(files, name)
    if table is None:
        return {}

    # The table names an image from the root or from its own folder.
    folder, keys = name.removesuffix(LABEL_FILE), list(files.images)
    images = keys
    if folder:
        keys = [image if image in table else image.removeprefix(folder) for image in images]

    # Every image needs a label; its name may only look the same.
    if missing := [image for image, key in zip(images, keys) if key not in table]:
        inner = missing[0].removeprefix(folder)
        why = file_names.explain_absence(inner, table) or file_names.explain_absence(missing[0], table)
        raise UserError(
            f'{files.path}: {name} has no label for {len(missing)} of {len(images)} images, such as '
            f'{missing[0]}' + (f'. {why}' if why else '; recreate it')
        )
    labels = _label_array([table[key] for key in keys], f'{files.path}: {name}')
    classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    if class_names and len(class_names) < classes:
        raise UserError(
            f'{files.path}: {name} has {classes} classes, but class_names names {len(class_names)}; complete '
            'that list, or remove the entry'
        )
    return dict(
        labels=labels,
        unused=np.array(len(table) - len(set(keys))),
        vectors=np.array(vectors),
        class_names=np.array(json.dumps(class_names)),
    )


def read_encoder(files: ImageFiles) -> dict | None:
    """Arguments of `encoders.build` from the `"encoder"` entry of `dataset.json`; None if there is none."""
    name = _label_file(files)
    try:
        encoder = None if name is None else _read_json(files, name).get('encoder')
    except limits.UNREADABLE as error:
        raise UserError(
            f'{files.path}: {name} is not {{"labels": [[name, label], ...]}} ({type(error).__name__}: '
            f'{error})'
        ) from error
    if not isinstance(encoder, (dict, type(None))):
        raise UserError(
            f'{files.path}: the encoder in {name} is not an object of constructor arguments; recreate it '
            'with dataset_tool.py'
        )
    return encoder


def _label_file(files: ImageFiles) -> str | None:
    # Of several label files, only one at the root is unambiguous.
    at_root = LABEL_FILE in files.label_files
    if not at_root and len(files.label_files) > 1:
        raise UserError(
            f'{files.path} holds several label files ({", ".join(files.label_files[:3])}, ...); keep one, or '
            'convert each data set separately'
        )
    name = LABEL_FILE if at_root else next(iter(files.label_files), None)
    if name is not None and not name.endswith(LABEL_FILE):
        raise UserError(
            f'{files.path}: {name} differs from {LABEL_FILE} in case; rename it, or remove it if it holds no '
            'labels'
        )
    return name


def _read_json(files: ImageFiles, name: str):
    # As many bytes as the labels of so many images may take.
    limit = max(limits.JSON_FILE, limits.LABELS_OF_IMAGE * len(files.images))
    with files.open(name, limit, f'a label file of {len(files.images):,} images') as file:
        return json.loads(file.read(), object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    if len(entries := dict(pairs)) < len(pairs):
        raise ValueError('it repeats a key')
    return entries


def _read_label_table(files: ImageFiles, name: str) -> tuple[dict | None, bool, list[str]]:
    """(labels by image name, or None; whether they are declared vectors; names of classes)."""
    # Read the pairs.
    try:
        content = _read_json(files, name)
        pairs, vectors = content['labels'], content.get('label_kind') == 'vectors'
        if pairs is None:
            return None, vectors, []
        pairs = [(file_names.with_slashes(image), label) for image, label in pairs]
    except limits.UNREADABLE as error:
        raise UserError(
            f'{files.path}: {name} is not {{"labels": [[name, label], ...]}} ({type(error).__name__}: '
            f'{error})'
        ) from error

    # The same label twice is harmless.
    table = dict(pairs)
    repeats = len(table) < len(pairs)
    if repeats and (twice := [image for image, label in pairs if table[image] != label]):
        raise UserError(f'{files.path}: {name} gives {twice[0]} two different labels; recreate it')
    return table, vectors, _checked_names(content.get('class_names'), f'{files.path}: {name}')


def _checked_names(names: object, source: str) -> list[str]:
    """Names of classes; [] for None. Raises: UserError unless they are different short texts."""
    names = [] if names is None else names
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) and 0 < len(name) <= limits.MAX_TEXT for name in names)
        or len(set(names)) < len(names)
    ):
        raise UserError(
            f'{source}: class_names must be a list of different names, one for each class, of at most '
            f'{limits.MAX_TEXT} characters; correct it, or remove that entry'
        )
    return names


def _label_array(labels: list, source: str) -> np.ndarray:
    # Class indices; a bool is none.
    if all(type(label) is int for label in labels):
        if not 0 <= min(labels) <= max(labels) < MAX_CLASSES:
            raise UserError(
                f'{source}: class indices from {min(labels)} to {max(labels)} are not in [0, {MAX_CLASSES})'
            )
        return np.array(labels, dtype=np.int64)

    # Vectors, whose values must be finite in float32.
    try:
        with np.errstate(over='ignore'):
            vectors = np.array(labels, dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        vectors = np.empty(0)
    if (
        vectors.ndim != 2
        or not vectors.size
        or not all(isinstance(label, list) for label in labels)
        or not np.isfinite(vectors).all()
    ):
        # The first label of another type than the others explains the refusal.
        ordinary = next((type(label) for label in labels if type(label) in (int, list)), None)
        odd = [label for label in labels if type(label) is not ordinary][:1]
        raise UserError(
            f'{source}: labels must be all class indices, or all vectors of one length with finite float32 '
            'values' + (f', got {json.dumps(odd[0])[:80]}' if odd else '')
        )
    return vectors
