"""What a file is, by its first bytes, for messages about files of the wrong kind. Nothing is executed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from dnnlib import limits
from dnnlib.archives import BoundedZip, open_member

HEAD = 4096  # first bytes, which decide; a tar archive's mark is at 257
# Bytes of a PyTorch file's pickle to search for its outermost names, which follow those of tensors.
PICKLE_HEAD = 1 << 22
ZIP, DAMAGED_ZIP, NPZ, NPY = (
    'a zip archive',
    'a damaged or incomplete zip archive',
    'a NumPy .npz archive',
    'a NumPy .npy array',
)

# (pattern of the first bytes, name of such a file); the first match decides.
STARTS = [
    (re.compile(pattern, re.DOTALL), words)
    for pattern, words in (
        (
            rb'version https://git-lfs',
            'a Git LFS pointer (the file itself was not downloaded; run git lfs pull)',
        ),
        (rb'(\xef\xbb\xbf)?\s*<(?i:!doctype\s+html|html|head|body)\b', 'a web page (HTML)'),
        (rb'(\xef\xbb\xbf)?\s*<(?i:\?xml|error)\b', "an XML document (a server's error message?)"),
        (rb'\x89PNG\r\n\x1a\n', 'a PNG image'),
        (rb'\xff\xd8\xff', 'a JPEG image'),
        (rb'GIF8[79]a', 'a GIF image'),
        (rb'RIFF....WEBP', 'a WebP image'),
        (rb'II\x2a\0|MM\0\x2a', 'a TIFF image'),
        (rb'BM....\0\0\0\0', 'a BMP image'),
        (rb'P[1-7]\s[\s\d#]', 'a PNM image'),
        (rb'....ftyp', 'a video or HEIF/AVIF image'),
        (rb'\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51', 'a JPEG 2000 image'),
        (rb'8BPS', 'a Photoshop file'),
        (rb'%!PS|\xc5\xd0\xd3\xc6', 'a PostScript document (EPS)'),
        (rb'%PDF-', 'a PDF document'),
        (rb'PK\x03\x04|PK\x05\x06|PK\x07\x08', ZIP),
        (rb'\x1f\x8b\x08', 'a gzip file'),
        (rb'BZh[1-9]', 'a bzip2 file'),
        (rb'\xfd7zXZ\0', 'an xz file'),
        (rb'\x28\xb5\x2f\xfd', 'a Zstandard file'),
        (rb'7z\xbc\xaf\x27\x1c', 'a 7-Zip archive'),
        (rb'Rar!\x1a\x07', 'a RAR archive'),
        (rb'.{257}ustar', 'a tar archive'),
        (rb'\x93NUMPY', NPY),
        (rb'\x89HDF\r\n\x1a\n', 'an HDF5 file'),
        (rb'.{8}\{\s*"', 'a safetensors file'),
        (rb'GGUF', 'a GGUF file'),
        (rb'PAR1', 'a Parquet file'),
        (rb'SQLite format 3\0', 'an SQLite data base'),
        (rb'.{16}\xde\xc0\xef\xbe', 'an LMDB data base'),
        (rb'\0\0\x08[\x01-\x04]', "an IDX file (MNIST's format)"),
        (
            rb'\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\.',
            'a PyTorch file (torch.save, before PyTorch 1.6)',
        ),
        (rb'\x80[\x02-\x05].{0,300}torch_utils\.persistence', 'a network snapshot'),
        (rb'\x80[\x02-\x05]', 'a pickle'),
    )
]

# What to do with a file of the wrong kind, by the beginning of its name above; {} is the wanted kind.
INSTEAD = {
    'a web page': 'It may be a log-in, a quota, or a wrong link: download the file in a browser and '
    'give its path.',
    'an XML document': 'Check where it was downloaded from, and give {}.',
    'an empty file': 'Was it truncated? Copy or download it again.',
    'a file of zeros': 'Copy or download it again.',
    DAMAGED_ZIP: 'Copy or download it again.',
    **dict.fromkeys(
        ('a gzip', 'a bzip2', 'an xz', 'a Zstandard', 'a 7-Zip', 'a RAR', 'a tar'), 'Unpack it, and give {}.'
    ),
    'a training state of EDM': 'Give {}.',
    'a training state': 'train.py --resume continues from it. Give {}.',
    'a network snapshot': 'Networks are for --network, --teacher and --transfer. Give {}.',
    'a TorchScript file': 'Feature detectors are for --detector. Give {}.',
    'a NumPy': 'Statistics are for --ref, arrays of images for --images. Give {}.',
}


# ----------------------------------------------------------------------------
# What a file is, and what to give instead.


def describe_file(source: str | os.PathLike | bytes) -> str | None:
    """What a file is, to complete 'it is ...', such as 'a web page (HTML)'; None if unknown.

    Args:
        source: a path, or the first `HEAD` bytes of a file, by which kinds of zip archives look alike.
    Raises: OSError if the file cannot be read.
    """
    if isinstance(source, bytes):
        return _describe_start(source)
    if os.path.isdir(source):
        return 'a folder'
    with open(source, 'rb') as file:
        words = _describe_start(file.read(HEAD))
    return _describe_zip(source) if words == ZIP else words


def another_kind(
    path: str | os.PathLike, wanted: str, own: Sequence[str] = (), instead: Mapping[str, str] | None = None
) -> str | None:
    """What a file is and what to give instead, to complete 'it ...': 'is a web page (HTML). It may be ...'.

    Args:
        wanted: the wanted kind, such as 'a network snapshot (.pkl)'.
        own: beginnings of the names of files of the wanted kind, damaged ones included.
        instead: cures by beginnings of names, which override `INSTEAD`.
    Returns: None if the file is of the wanted kind or of an unknown one.
    """
    words = describe_file(path)
    if words is None or words.startswith(tuple(own)):
        return None
    cures = {
        **(instead or {}),
        **{start: cure.format(wanted) for start, cure in INSTEAD.items() if start not in (instead or {})},
    }
    cure = next((cure for start, cure in cures.items() if words.startswith(start)), f'Give {wanted}.')
    return f'is {words}. {cure}'


def _describe_start(head: bytes) -> str | None:
    head = head[:HEAD]
    if not head:
        return 'an empty file'
    if (words := next((words for pattern, words in STARTS if pattern.match(head)), None)) is not None:
        return words
    if not head.strip(b'\0'):
        return 'a file of zeros (an interrupted download or copy?)'
    # Control characters other than those of text mean binary contents.
    if re.search(rb'[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]', head) or not _is_utf8(head):
        return None
    return 'a JSON file' if re.match(rb'(\xef\xbb\xbf)?\s*[\[{]', head) else 'text'


def _is_utf8(head: bytes) -> bool:
    """Whether bytes are UTF-8; the last character may be cut off."""
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.reason == 'unexpected end of data'
    return True


def _describe_zip(path: str | os.PathLike) -> str:
    """The kind of a zip archive, by its members' names."""
    try:
        # PyTorch's files: TorchScript has code, torch.save only a pickle.
        with BoundedZip(path) as archive:
            names = archive.namelist()
            record = next((name for name in names if re.fullmatch(r'([^/]+/)?data\.pkl', name)), None)
            if any(name.endswith('/constants.pkl') or '/code/' in name for name in names):
                return 'a TorchScript file (torch.jit.save)'
            if record is not None:
                with open_member(
                    archive, archive.getinfo(record), limits.SAVED_STRUCTURE, 'the pickle of a PyTorch file'
                ) as file:
                    return _describe_saved(file.read(PICKLE_HEAD))
    except limits.TooLarge:
        return ZIP
    except limits.UNREADABLE:
        return DAMAGED_ZIP

    # Files of other programs.
    if names and all(name.endswith('.npy') and '/' not in name for name in names):
        return NPZ
    if '[Content_Types].xml' in names:
        return 'an Office document'
    return ZIP


def _describe_saved(pickled: bytes) -> str:
    """What `torch.save` wrote, by names in its pickle."""

    def names(*words: str) -> bool:
        # BINUNICODE: X, the length in four bytes, the text.
        return all(b'X' + len(word).to_bytes(4, 'little') + word.encode() in pickled for word in words)

    if names('optimizer_state'):
        return 'a training state of EDM'
    if names('net', 'update'):
        return 'a training state of train.py'
    return 'a PyTorch file (torch.save)'
