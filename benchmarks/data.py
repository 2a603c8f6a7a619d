"""Time to open a data set, and images per second read from it.

`index`: open a zip of stored members and a dataset.json, as large as ImageNet, with labels as training does,
in a new process each time: first with nothing cached, then with the cached index; for comparison Python's
zipfile, which only reads the directory. `decode`: items per second of a data set in one process. `loader`:
the same through training's `Prefetcher`, by number of workers, in uint8 batches. The PNGs are crops of
photographs, uncompressed as dataset_tool.py writes them; files are in the page cache. Numbers are minima over
rounds, taken in turns.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path

import click
import numpy as np

if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import apart, block, in_turns, least, rounds_option, table
from dnnlib import cli

RESOLUTIONS = {32: 2, 64: 1}  # {resolution: factor for the number of images}
BATCH = 64
CLASSES = 1000
CHUNK = 1 << 16  # members written at a time


def write_alike(path: Path, data: bytes, count: int) -> None:
    """Write a zip of `count` stored members with the same data, `00000/img00000000.png` and so on, and
    labels.

    Builds the records of the format by NumPy, which takes seconds instead of a library's minutes.
    """
    # Fields that all members share, and those of dataset.json.
    names = np.char.add(
        np.char.add(np.char.zfill((np.arange(count) // 1000).astype('S5'), 5), b'/img'),
        np.char.add(np.char.zfill(np.arange(count).astype('S8'), 8), b'.png'),
    )
    length, facts = (
        names.itemsize,
        struct.pack('<IIIHH', zlib.crc32(data), len(data), len(data), names.itemsize, 0),
    )
    # Version 2.0, no flags, stored, 1980-01-01.
    fixed = struct.pack('<HHHHH', 20, 0, 0, 0, 0x21)
    stride = 30 + length + len(data)
    labels = [[name.decode(), i % CLASSES] for i, name in enumerate(names)]
    last = json.dumps(dict(labels=labels)).encode()
    last_facts = struct.pack('<IIIHH', zlib.crc32(last), len(last), len(last), len('dataset.json'), 0)
    with open(path, 'wb') as file:
        # Local headers and data.
        for start in range(0, count, CHUNK):
            part = np.frombuffer(names[start : start + CHUNK].tobytes(), np.uint8).reshape(-1, length)
            file.write(_rows(b'PK\3\4' + fixed + facts, part, data))
        file.write(b'PK\3\4' + fixed + last_facts + b'dataset.json' + last)

        # Central directory; bytes 42 to 46 of an entry are the offset of its local header.
        directory = file.tell()
        for start in range(0, count, CHUNK):
            part = np.frombuffer(names[start : start + CHUNK].tobytes(), np.uint8).reshape(-1, length)
            rows = np.frombuffer(
                bytearray(_rows(b'PK\1\2\x14\0' + fixed + facts + bytes(14), part, b'')), np.uint8
            ).reshape(len(part), -1)
            rows[:, 42:46] = (np.arange(start, start + len(part), dtype='<u4') * np.uint32(stride))[
                :, None
            ].view(np.uint8)
            file.write(rows.tobytes())
        file.write(
            b'PK\1\2\x14\0'
            + fixed
            + last_facts
            + bytes(10)
            + struct.pack('<I', count * stride)
            + b'dataset.json'
        )

        # End of the directory, in ZIP64 as more than 65,535 members require.
        end = file.tell()
        file.write(
            struct.pack(
                '<4sQHHIIQQQQ', b'PK\6\6', 44, 45, 45, 0, 0, count + 1, count + 1, end - directory, directory
            )
        )
        file.write(struct.pack('<4sIQI', b'PK\6\7', 0, end, 1))
        file.write(struct.pack('<4sHHHHIIH', b'PK\5\6', 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def _rows(before: bytes, names: np.ndarray, after: bytes) -> bytes:
    """Each of the names [n, length] between the same bytes."""
    repeat = lambda data: np.broadcast_to(np.frombuffer(data, np.uint8), [len(names), len(data)])
    return np.concatenate([repeat(before), names, repeat(after)], axis=1).tobytes()


def photographs(resolution: int, count: int) -> list[bytes]:
    """PNGs without compression, random crops of scikit-learn's two photographs."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    from data.archive_writer import png_bytes

    rng, pictures = np.random.default_rng(0), load_sample_images().images
    files = []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        top, left = (rng.integers(side - 256) for side in picture.shape[:2])
        crop = Image.fromarray(picture[top : top + 256, left : left + 256])
        files.append(png_bytes(crop.resize([resolution] * 2, Image.Resampling.BOX)))
    return files


def write_photographs(path: Path, resolution: int, count: int) -> Path:
    """Write a data set of `count` images, of which at most 200 differ."""
    import zipfile

    files = photographs(resolution, min(count, 200))
    with zipfile.ZipFile(path, 'w') as archive:
        for i in range(count):
            archive.writestr(f'{i:08d}.png', files[i % len(files)])
        archive.writestr(
            'dataset.json', json.dumps(dict(labels=[[f'{i:08d}.png', i % 10] for i in range(count)]))
        )
    return path


def time_opening(path: str, how: str) -> list[float]:
    """[wall time, CPU time] in seconds to open a zip in this process, without imports."""
    import zipfile

    from data.dataset import ImageFolderDataset

    start, cpu = time.perf_counter(), time.process_time()
    if how == 'zipfile':
        zipfile.ZipFile(path).close()
    else:
        dataset = ImageFolderDataset(path, use_labels=True)
        assert dataset.label_dim == CLASSES
    return [time.perf_counter() - start, time.process_time() - cpu]


def time_index(folder: Path, members: int, rounds: int) -> dict[str, list[float]]:
    """Times to open a zip with this number of members, see `time_opening`; minima over rounds."""
    path = folder / 'many.zip'
    write_alike(path, photographs(8, 1)[0], members)

    # The index is cached in the home folder, which is new in every round.
    seconds = {'zipfile': [], 'first': [], 'again': []}
    for i in range(rounds):
        home = dict(HOME=str(folder / f'home{i}'))
        for how in seconds:
            seconds[how].append(apart(__file__, f'--measure={how}', f'--folder={path}', env=home))
    path.unlink()
    return {how: [min(column) for column in zip(*values)] for how, values in seconds.items()}


def time_reading(path: Path, count: int, workers: list[int], rounds: int) -> dict[str, float]:
    """Images per second, by way of reading."""
    import torch

    from data.dataset import ImageFolderDataset, InfiniteSampler
    from data.prefetcher import Prefetcher

    dataset = ImageFolderDataset(path, use_labels=True)
    order = np.random.default_rng(0).permutation(len(dataset))[:count].tolist()

    def load(number):
        prefetcher = Prefetcher(
            dataset, InfiniteSampler(len(dataset), BATCH), BATCH, number, torch.device('cpu')
        )
        next(prefetcher)  # waits for the workers to start

        def read():
            for _ in range(count // BATCH):
                next(prefetcher)

        return read

    calls = {
        'decode': lambda: [dataset[i] for i in order],
        **{f'{number} workers': load(number) for number in workers},
    }
    return {
        name: (count if name == 'decode' else count // BATCH * BATCH) / seconds
        for name, seconds in least(in_turns(calls, rounds)).items()
    }


@click.command(cls=cli.Command)
@cli.option(
    '--members',
    metavar='INT',
    type=click.IntRange(min=1),
    default=1_281_167,
    show_default=True,
    help='Number of images in the zip that is opened.',
)
@cli.option(
    '--images',
    metavar='INT',
    type=click.IntRange(min=BATCH),
    default=2000,
    show_default=True,
    help='Number of 64x64 images to read per round.',
)
@cli.option(
    '--workers',
    metavar='LIST',
    type=cli.NumberList(cli.WORKERS),
    default='0,1,2',
    show_default=True,
    help='Numbers of loading processes.',
)
@rounds_option('Number of repetitions, of which the fastest counts.')
@cli.option(
    '--folder',
    metavar='DIR',
    type=cli.PATH,
    help='Folder to write the files in, 0.5 GB by default.  [default: a temporary folder]',
)
@cli.option('--measure', hidden=True)
@cli.option('--json', 'as_json', is_flag=True, help='Print one JSON object.')
def main(members, images, workers, rounds, folder, measure, as_json):
    """Time opening a large data set and reading images."""
    if measure is not None:
        click.echo(json.dumps(time_opening(folder, measure)))
        return

    # Measure.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        index = time_index(Path(temporary), members, rounds)
        rates = {}
        for resolution, factor in RESOLUTIONS.items():
            path = write_photographs(Path(temporary) / f'{resolution}.zip', resolution, images * factor)
            rates[resolution] = time_reading(path, images * factor, workers, rounds)
    if as_json:
        click.echo(json.dumps(dict(members=members, seconds=index, images_per_second=rates)))
        return

    # Print the block.
    prose = (
        f'A zip of {members:,} stored PNGs with labels: seconds to open it as training does, the first time '
        "and with the cached index, and for Python's zipfile to read its directory; in parentheses CPU time. "
        'Images per second of PNGs without compression: `decode` in one process without batches, then in '
        f"uint8 batches of {BATCH} through training's prefetcher. {rounds} rounds, in turns; the least time "
        'counts.'
    )
    opening = [f'{wall:.2f} s ({cpu:.2f} s)' for wall, cpu in index.values()]
    reading = [
        [f'{resolution}x{resolution}', *(f'{rate:.0f} /s' for rate in row.values())]
        for resolution, row in rates.items()
    ]
    click.echo(
        block(
            'Data: opening and reading',
            prose,
            table(['members', 'zipfile', 'first time', 'again'], [[f'{members:,}', *opening]]),
            table(['PNGs', *next(iter(rates.values()))], reading),
        )
    )


if __name__ == '__main__':
    main()
