"""An LMDB data base, read by a process of its own: its pages are mapped, and damaged ones can end whoever
follows them.

    python lmdb_pipe.py FOLDER COUNT

writes the number of records, then the first COUNT of them, as lengths of key and value followed by these. It
imports nothing of this project.
"""

import signal
import struct
import sys

HEAD = struct.Struct('<Q')
LENGTHS = struct.Struct('<QQ')
PATIENCE = 60  # seconds for a record, then SIGALRM ends it: a damaged tree of pages may have no end


def main(folder: str, count: int) -> None:
    import lmdb

    write = sys.stdout.buffer.write
    try:
        with lmdb.open(folder, readonly=True, lock=False) as base, base.begin(buffers=True) as transaction:
            write(HEAD.pack(transaction.stat()['entries']))
            records, previous = iter(transaction.cursor()), None
            for _ in range(count):
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
