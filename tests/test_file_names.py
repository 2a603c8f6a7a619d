"""Names of files in data sets: links, separators, Unicode forms; and files that are no data sets, called what they are."""

import io
import json
import os
import tarfile
import unicodedata
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import assert_one_clear_error
from PIL import Image

import dataset_tool
from data import zip_index
from data.dataset import ImageFolderDataset
from data.image_files import ImageFiles
from data.label_file import read_labels
from dnnlib import UserError
from metrics.images import open_images

READERS = [ImageFiles, ImageFolderDataset, open_images]


def png(seed=0):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, [4, 4], dtype=np.uint8)).save(data, 'png')
    return data.getvalue()


def run(source, dest, *options):
    return CliRunner().invoke(dataset_tool.main, [f'--source={source}', f'--dest={dest}', *options])


def labels_of(dest):
    return [label for _, label in json.loads(zipfile.ZipFile(dest).read('dataset.json'))['labels']]


def folder(path, *names):
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(png(i))
    return path


def archive(path, *names, labels=None):
    with zipfile.ZipFile(path, 'w') as file:
        for i, name in enumerate(names):
            file.writestr(name, png(i))
        if labels is not None:
            file.writestr('dataset.json', json.dumps({'labels': labels}))
    return path


# ----------------------------------------------------------------------------
# Links.


@pytest.fixture
def linked(tmp_path):
    """Class folders cat, dog (a link) and emu (a link to that link); in cat an image that is a link; all of it behind a link."""
    folder(tmp_path / 'elsewhere', 'dog/1.png', 'dog/x/2.png')
    folder(tmp_path / 'real', 'cat/1.png')
    (tmp_path / 'real/dog').symlink_to(tmp_path / 'elsewhere/dog')
    (tmp_path / 'real/emu').symlink_to('dog')
    (tmp_path / 'real/cat/2.png').symlink_to('../dog/1.png')
    (tmp_path / 'src').symlink_to('real')
    return tmp_path / 'src'


LINKED = ['cat/1.png', 'cat/2.png', 'dog/1.png', 'dog/x/2.png', 'emu/1.png', 'emu/x/2.png']


def test_links_to_folders_and_files_are_followed_everywhere(tmp_path, linked):
    """A folder that two links lead to is there twice."""
    assert ImageFiles(linked).images == LINKED
    assert len(ImageFolderDataset(linked)) == len(open_images(linked)) == 6
    assert run(linked, tmp_path / 'out.zip').exit_code == 0 and labels_of(tmp_path / 'out.zip') == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    table = tmp_path / 'labels.json'
    table.write_text(json.dumps({'labels': [[name, i] for i, name in enumerate(LINKED)]}))
    (tmp_path / 'real/dataset.json').symlink_to(table)
    assert read_labels(ImageFiles(linked)).tolist() == list(range(6))


@pytest.mark.parametrize('link, target', [('cat/all', '..'), ('dog/up/again', '../..'), ('cat/self', '.')])
@pytest.mark.parametrize('read', READERS)
def test_a_link_that_leads_into_a_folder_above_it_is_named(tmp_path, link, target, read):
    source = folder(tmp_path / 'src', 'cat/1.png', 'dog/up/1.png')
    (source / link).symlink_to(target)
    with pytest.raises(UserError, match=rf'{link} is a link to a folder that contains it'):
        read(source)


def test_two_folders_that_link_to_each_other_are_named(tmp_path):
    source = folder(tmp_path / 'src', 'a/1.png', 'b/2.png')
    (source / 'a/b').symlink_to('../b')
    (source / 'b/a').symlink_to('../a')
    with pytest.raises(UserError, match=r'(a/b/a|b/a/b) is a link to a folder that contains it'):
        ImageFiles(source)


@pytest.mark.parametrize(
    'name, target', [('fox', '/nowhere/fox'), ('cat/3.png', 'gone.png'), ('self', 'self')]
)
def test_a_link_to_nothing_or_to_itself_is_named(tmp_path, name, target):
    source = folder(tmp_path / 'src', 'cat/1.png')
    (source / name).symlink_to(target)
    assert_one_clear_error(
        run(source, tmp_path / 'out.zip'), f'{name} is a link to {target}', 'fix or remove it'
    )


def test_hidden_files_and_folders_are_left_out_whatever_links_they_have(tmp_path):
    source = folder(tmp_path / 'src', '1.png', '.git/2.png', '.3.png', '__MACOSX/4.png')
    (source / '.git/loop').symlink_to('..')
    (source / '.nowhere').symlink_to('nowhere')
    assert ImageFiles(source).images == ['1.png']


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    source, scan = folder(tmp_path / 'src', 'cat/1.png', 'dog/2.png'), os.scandir

    def scandir(path):
        if str(path).rstrip('/').endswith('dog'):
            raise PermissionError(13, 'Permission denied')
        return scan(path)

    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(UserError, match=r'dog/ cannot be read \(Permission denied\)'):
        ImageFiles(source)


@pytest.mark.parametrize('name', ['dog', 'cat/2.png', 'dataset.json'])
@pytest.mark.parametrize('extra', [False, True])
def test_a_link_in_a_zip_is_named(tmp_path, name, extra):
    """Also where zipfile reads the directory, for its extra fields."""
    path = archive(tmp_path / 'data.zip', 'cat/1.png')
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr, info.extra = 3, 0o120777 << 16, b'UT\1\0x' if extra else b''
    with zipfile.ZipFile(path, 'a') as file:
        file.writestr(info, '/somewhere')
    for read in READERS:
        with pytest.raises(UserError, match=f'{name} is a symbolic link'):
            read(path)


# ----------------------------------------------------------------------------
# Backslashes.


def test_backslashes_separate_folders_in_zips_in_labels_and_in_what_was_unpacked(tmp_path):
    names = ['cat\\1.png', 'dog\\x\\2.png', 'dog/3.png']
    expected = ['cat/1.png', 'dog/3.png', 'dog/x/2.png']
    zipped, unpacked = archive(tmp_path / 'a.zip', *names), folder(tmp_path / 'a', *names)
    for source in (zipped, unpacked):
        assert list(ImageFiles(source).images) == expected
        assert run(source, tmp_path / 'out.zip').exit_code == 0 and labels_of(tmp_path / 'out.zip') == [
            0,
            1,
            1,
        ]
        pixels = [ImageFolderDataset(source)[i][0][0] for i in range(3)]
        np.testing.assert_array_equal(pixels, [np.asarray(Image.open(io.BytesIO(png(i)))) for i in (0, 2, 1)])
        assert len(open_images(source).fingerprint()) == 64
    assert ImageFolderDataset(zipped).digest() == ImageFolderDataset(unpacked).digest()
    labels = [['cat/1.png', 5], ['dog\\x\\2.png', 6], ['dog\\3.png', 7]]
    assert read_labels(ImageFiles(archive(tmp_path / 'b.zip', *names, labels=labels))).tolist() == [5, 7, 6]
    (unpacked / 'dataset.json').write_text(json.dumps({'labels': labels}))
    assert read_labels(ImageFiles(unpacked)).tolist() == [5, 7, 6]


@pytest.mark.parametrize(
    'other, label, fine', [('a.png', 1, True), ('a.png', 2, False), ('b\\a.png', 2, True)]
)
def test_two_labels_of_one_file_are_an_error_unless_they_are_the_same(tmp_path, other, label, fine):
    path = archive(tmp_path / 'a.zip', 'a.png', labels=[['a.png', 1], [other, label]])
    if fine:
        assert read_labels(ImageFiles(path)).tolist() == [1]
    else:
        with pytest.raises(UserError, match=r'dataset\.json gives a\.png two different labels'):
            read_labels(ImageFiles(path))


def test_a_name_with_either_separator_is_one_name_and_both_are_named(tmp_path):
    for source in (
        archive(tmp_path / 'a.zip', 'a/b.png', 'a\\b.png'),
        folder(tmp_path / 'a', 'a/b.png', 'a\\b.png'),
    ):
        with pytest.raises(UserError, match=r'has both a/b\.png and a\\b\.png'):
            ImageFiles(source)


def test_backslashes_hide_nothing_and_lead_nowhere(tmp_path):
    assert list(
        ImageFiles(archive(tmp_path / 'a.zip', 'a\\1.png', '.b\\2.png', '__MACOSX\\3.png')).images
    ) == ['a/1.png']
    with pytest.raises(UserError, match='is outside the data set'):
        ImageFiles(archive(tmp_path / 'b.zip', '..\\1.png'))


def test_a_listing_that_an_older_version_kept_is_not_used(tmp_path, monkeypatch):
    """The key of the cache has the format in it, which changed when names did."""
    path = archive(tmp_path / 'a.zip', 'cat\\1.png')
    key = zip_index.ZipIndex.read(str(path)).key
    monkeypatch.setattr(zip_index, 'FORMAT', 1)
    assert zip_index.ZipIndex.read(str(path)).key != key


def test_the_handed_zip_has_two_class_folders(tmp_path, fixtures):
    assert run(fixtures / 'faults/backslash.zip', tmp_path / 'out.zip').exit_code == 0
    assert labels_of(tmp_path / 'out.zip') == [0, 1, 1]


# ----------------------------------------------------------------------------
# Names that look the same.

NFC, NFD = (unicodedata.normalize(form, 'ä.png') for form in ('NFC', 'NFD'))


@pytest.mark.parametrize(
    'file, label, words',
    [
        (
            NFD,
            NFC,
            (
                "'a\\u0308.png'",
                "'\\xe4.png'",
                'composed, NFC against decomposed, NFD',
                'unicodedata.normalize',
            ),
        ),
        (
            NFC,
            NFD,
            (
                "'a\\u0308.png'",
                "'\\xe4.png'",
                'decomposed, NFD against composed, NFC',
                'unicodedata.normalize',
            ),
        ),
        (f'sub/{NFD}', f'sub\\{NFC}', ('normalization',)),
        ('A.png', 'a.PNG', ('differs in case only',)),
        ('a b.png', 'a%20b.png', ('%XX',)),
        ('a.png', './a.png', ('another path',)),
        ('a.png', 'b.png', ('such as a.png; recreate it',)),
    ],
)
def test_why_a_label_does_not_find_its_file_is_told(tmp_path, file, label, words):
    zipped, unpacked = archive(tmp_path / 'a.zip', file, labels=[[label, 1]]), folder(tmp_path / 'a', file)
    (unpacked / 'dataset.json').write_text(json.dumps({'labels': [[label, 1]]}))
    for source in (zipped, unpacked):
        assert_one_clear_error(
            run(source, tmp_path / 'out.zip'), 'dataset.json has no label for 1 of 1 images', *words
        )
    assert read_labels(ImageFiles(archive(tmp_path / 'b.zip', file, labels=[[file, 1]]))).tolist() == [1]


@pytest.mark.parametrize('stored, found', [('caé.png'.encode('cp437'), True), ('caé.png'.encode(), False)])
def test_names_of_zips_without_the_flag_are_read_as_code_page_437_and_utf_8_is_told(tmp_path, stored, found):
    path = archive(tmp_path / 'a.zip', 'X' * len(stored), labels=[['caé.png', 1]])
    path.write_bytes(path.read_bytes().replace(b'X' * len(stored), stored))
    result = run(path, tmp_path / 'out.zip')
    if found:
        assert result.exit_code == 0 and labels_of(tmp_path / 'out.zip') == [1]
    else:
        assert_one_clear_error(result, 'the zip does not flag its names as UTF-8')


def test_class_folders_that_look_the_same_are_an_error_or_noted(tmp_path):
    error = run(archive(tmp_path / 'a.zip', f'{NFC}/1.png', f'{NFD}/1.png'), tmp_path / 'out.zip')
    assert_one_clear_error(error, "'a\\u0308.png' and '\\xe4.png' differ in Unicode normalization only")
    result = run(archive(tmp_path / 'b.zip', 'Cat/1.png', 'cat/1.png'), tmp_path / 'out.zip')
    assert "'Cat' and 'cat' differ in case only; they are two classes" in result.output and labels_of(
        tmp_path / 'out.zip'
    ) == [0, 1]


def test_the_handed_zip_with_a_decomposed_name_is_explained(tmp_path, fixtures):
    assert_one_clear_error(
        run(fixtures / 'faults/nfd.zip', tmp_path / 'out.zip'),
        'Unicode normalization',
        'composed',
        'decomposed',
    )


# ----------------------------------------------------------------------------
# Files of other kinds.


def tar_bytes():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode='w') as file:
        info = tarfile.TarInfo('a.png')
        info.size = len(png())
        file.addfile(info, io.BytesIO(png()))
    return data.getvalue()


LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n'


@pytest.mark.parametrize(
    'content, words',
    [
        (b'<!DOCTYPE html><html></html>', ('a web page', 'download')),
        (LFS, ('Git LFS pointer', 'git lfs pull')),
        (b'', ('an empty file',)),
        (png(), ('a PNG image', 'name the folder')),
        (tar_bytes(), ('a tar archive', 'unpack')),
        (b'Rar!\x1a\x07\x01\0\2', ('a RAR archive', 'unpack')),
        (b'\x80\4\x95\1', ('a pickle',)),
        (b'PK\3\4' + bytes(range(40)), ('incomplete zip archive', 'copy or recreate')),
    ],
)
def test_a_data_set_that_is_none_is_called_what_it_is(tmp_path, content, words):
    path = tmp_path / 'data.zip'
    path.write_bytes(content)
    for read in READERS:
        with pytest.raises(UserError) as error:
            read(path)
        assert all(word in str(error.value) for word in words), str(error.value)
    assert_one_clear_error(run(path, tmp_path / 'out.zip'), *words)


def test_arrays_are_no_data_sets_and_the_cure_is_named(tmp_path):
    for name, save in (('a.npz', np.savez), ('a.npy', np.save)):
        save(tmp_path / name, np.zeros([2, 4, 4, 3], np.uint8))
        with pytest.raises(UserError, match=r'NumPy \.np[zy].*dataset_tool\.py'):
            ImageFolderDataset(tmp_path / name)
    os.rename(tmp_path / 'a.npz', tmp_path / 'a.zip')
    result = run(tmp_path / 'a.zip', tmp_path / 'out.zip')
    assert_one_clear_error(
        result, 'arr_0.npy is not a readable file of latents (its header says uint8 [2, 4, 4, 3]'
    )


@pytest.mark.parametrize(
    'content, words',
    [(LFS, 'it is a Git LFS pointer'), (b'<html>', 'it is a web page'), (b'', 'it is an empty file')],
)
def test_an_image_that_is_none_is_called_what_it_is(tmp_path, content, words):
    source = folder(tmp_path / 'src', '0.png')
    (source / '1.png').write_bytes(content)
    assert_one_clear_error(run(source, tmp_path / 'out.zip'), f'1.png is not a readable image ({words}')


@pytest.mark.parametrize(
    'name', ['cifar-10-python.tar.gz', 'train-images-idx3-ubyte.gz', 'train-images-idx3-ubyte']
)
def test_a_download_that_failed_is_called_what_it_is(tmp_path, name):
    for other in (name, 'train-labels-idx1-ubyte.gz'):
        (tmp_path / other).write_bytes(b'<html>Not found</html>')
    assert_one_clear_error(run(tmp_path / name, tmp_path / 'out.zip'), 'a web page')
