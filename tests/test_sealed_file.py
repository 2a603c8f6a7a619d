"""Files that end in their own checksum: what it notices, and parts read by several threads."""

import hashlib
import random
import zlib

import numpy as np
import pytest

from torch_utils import sealed_file
from torch_utils.sealed_file import (
    PIECE,
    SEAL_LENGTH,
    DamagedFile,
    find_seal,
    read_parts,
    read_sealed,
    sealed,
)

SIZES = [0, 1, 8, 4097, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 4097]


def written(path, data, pieces):
    """Writes data in pieces of the given lengths, the last as long as needed; the file's whole content."""
    with sealed(path) as file:
        start = 0
        for length in pieces:
            file.write(data[start : start + length])
            start += length
        file.write(data[start:])
    return path.read_bytes()


def random_bytes(size, seed=0):
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize('size', SIZES)
def test_the_seal_does_not_depend_on_how_the_file_was_written(tmp_path, size):
    data, draw = random_bytes(size), random.Random(1)
    whole = written(tmp_path / 'a', data, [])
    assert whole[:size] == data and len(whole) == size + SEAL_LENGTH
    for pieces in (
        [1] * 20,
        [PIECE] * 3,
        [PIECE - 1, 2, PIECE],
        [draw.randrange(2 * PIECE) for _ in range(10)],
    ):
        assert written(tmp_path / 'b', data, pieces) == whole
    assert written(tmp_path / 'c', memoryview(np.frombuffer(data, np.uint8)), [3]) == whole


@pytest.mark.parametrize('size', SIZES)
def test_a_sealed_file_is_found_whole_and_its_parts_are_what_was_written(tmp_path, size):
    """Parts at the file's ends and across chunks, overlapping, and empty."""
    data, draw = random_bytes(size), random.Random(2)
    written(tmp_path / 'file', data, [])
    starts = [0, size, *(draw.randrange(size + 1) for _ in range(20))]
    stops = [size, size, *(draw.randrange(start, size + 1) for start in starts[2:])]
    for seal in (True, False):
        targets = [np.zeros(stop - start, np.uint8) for start, stop in zip(starts, stops)]
        with open(tmp_path / 'file', 'rb') as file:
            length, found = find_seal(file)
            assert length == size and file.tell() == 0
            if seal:
                read_sealed(file, length, found, list(zip(starts, targets)))
            else:
                read_parts(file, list(zip(starts, targets)))
        assert all(
            target.tobytes() == data[start:stop] for start, stop, target in zip(starts, stops, targets)
        )


def test_the_checksum_is_the_documented_one(tmp_path):
    data = random_bytes(2 * PIECE + 20)
    sums = b''.join(zlib.crc32(data[i : i + PIECE]).to_bytes(4, 'little') for i in range(0, len(data), PIECE))
    assert (
        written(tmp_path / 'file', data, [])
        == data + b'\n#checksum ' + hashlib.sha256(sums).hexdigest().encode() + b'\n'
    )


def test_damage_is_noticed_and_a_file_that_was_cut_too(tmp_path):
    data = random_bytes(2 * PIECE + 100)
    whole = bytearray(written(tmp_path / 'file', data, []))
    with open(tmp_path / 'file', 'rb') as file:
        size, seal = find_seal(file)
    for position in (0, PIECE - 1, PIECE, size - 1):
        whole[position] ^= 1
        (tmp_path / 'file').write_bytes(whole)
        whole[position] ^= 1
        with open(tmp_path / 'file', 'rb') as file, pytest.raises(DamagedFile, match='checksum'):
            read_sealed(file, size, seal)
    (tmp_path / 'file').write_bytes(whole[: PIECE + 5])
    with open(tmp_path / 'file', 'rb') as file:
        assert find_seal(file) == (PIECE + 5, None)
        for read in (
            lambda: read_sealed(file, size, seal),
            lambda: read_parts(file, [(PIECE, np.zeros(10, np.uint8))]),
        ):
            with pytest.raises(DamagedFile, match='truncated'):
                read()


def test_a_read_that_returns_less_than_asked_for_is_continued(tmp_path, monkeypatch):
    """As Linux does beyond 2 GiB, and file systems over a network at any time."""
    data = random_bytes(1000)
    (tmp_path / 'file').write_bytes(data)
    preadv = sealed_file.os.preadv
    monkeypatch.setattr(
        sealed_file.os,
        'preadv',
        lambda descriptor, buffers, start: preadv(descriptor, [buffers[0][:7]], start),
    )
    target = np.zeros(500, np.uint8)
    with open(tmp_path / 'file', 'rb') as file:
        read_parts(file, [(100, target)])
    assert target.tobytes() == data[100:600]
