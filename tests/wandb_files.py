"""What W&B wrote, as its `wandb sync` would read it: a private format, which tests look into and programs do not."""

import struct
import zlib
from collections.abc import Iterator


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, as far as they are intact: a .wandb file has 7 bytes of its own and
    then such a log.

    Blocks of 32 KiB, counted from the start of the file, hold pieces with a header of 7 bytes: CRC-32 of what follows the length, length,
    kind (1 a whole record, 2 its first piece, 3 a middle one, 4 its last). Less than a header at a block's end is padding.
    """
    position, record = 7, b''
    while position + 7 <= len(data):
        room = -position % 32768 or 32768
        if room < 7:
            position += room
            continue
        checksum, length, kind = struct.unpack_from('<IHB', data, position)
        piece = data[position + 7 : position + 7 + length]
        if len(piece) < length or zlib.crc32(bytes([kind]) + piece) != checksum:
            return
        record = piece if kind in (1, 2) else record + piece
        if kind in (1, 4):
            yield record
        position += 7 + length
