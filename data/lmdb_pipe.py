"""Read an LMDB database in a separate process: following damaged pages of its memory map may crash it.

    python lmdb_pipe.py FOLDER COUNT

writes the number of records, then the first COUNT records: length of key, length of value, key, value.
Imports nothing of this project.
"""

import signal
import struct
import sys

HEAD = struct.Struct('<Q')
LENGTHS = struct.Struct('<QQ')
PATIENCE = 60  # seconds per record until SIGALRM ends the process: a damaged page tree may be cyclic


def main(folder: str, count: int) -> None:
    import lmdb

    write = sys.stdout.buffer.write
    try:
        with lmdb.open(folder, readonly=True, lock=False) as base, base.begin(buffers=True) as transaction:
            write(HEAD.pack(transaction.stat()['entries']))

            # Keys out of order mean damaged pages, which may lead in circles.
            records, previous = iter(transaction.cursor()), None
            for _ in range(count):
                # The default action of SIGALRM ends the process, even inside the library.
                signal.alarm(PATIENCE)
                key, value = next(records, (None, None))
                signal.alarm(0)
                if key is None:
                    break
                if previous is not None and bytes(key) <= previous:
                    sys.exit('its keys are not in order')
                previous = bytes(key)
                write(LENGTHS.pack(len(key), len(value)))
                write(key)
                write(value)
            sys.stdout.buffer.flush()
    except lmdb.Error as error:
        sys.exit(str(error))


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]))
