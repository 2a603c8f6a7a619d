"""Small data sets of random images, file by file."""

import io
import json
import zipfile

import numpy as np
from PIL import Image


def png(pixels, mode=None, **options):
    data = io.BytesIO()
    image = Image.fromarray(np.asarray(pixels))
    (image.convert(mode) if mode else image).save(data, format='PNG', **options)
    return data.getvalue()


def random_images(count, size=4, channels=3, seed=0):
    shape = (count, size, size, channels) if channels == 3 else (count, size, size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_folder(path, files):
    for name, data in files.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return path


def write_zip(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def label_json(labels):
    return json.dumps({'labels': labels}).encode()
