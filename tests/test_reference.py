"""References: every format read from a file in that layout, and what is refused, by file and key."""

import io
import itertools
import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from types import SimpleNamespace

import helpers
import numpy as np
import pytest

import fid
from dnnlib.util import EasyDict, UserError
from metrics import detectors
from metrics.detectors import DINOV2, INCEPTION_URL
from metrics.reference import (
    Reference,
    check_before_download,
    check_same_detector,
    holds_statistics,
    load_reference,
    reference_images,
    save_reference,
)

DIM = 5


def statistics(seed=0, dim=DIM, dtype=np.float64):
    """(mu, sigma) of forty samples."""
    features = np.random.default_rng(seed).normal(size=(40, dim))
    return features.mean(axis=0).astype(dtype), np.cov(features, rowvar=False).astype(dtype)


MU, SIGMA = statistics()
MU2, SIGMA2 = statistics(1, 3)
FEATURES = np.random.default_rng(2).normal(size=(9, DIM)).astype(np.float32)
OURS = {
    'fid': Reference(MU, SIGMA, 'inception', 'a' * 64, 9, '8x6x3', FEATURES),
    'fd_dinov2': Reference(MU2, SIGMA2, 'dinov2-large', 'b' * 64, 9, '8x6x3'),
}
EDM2 = dict(num_images=50000, fid=dict(mu=MU, sigma=SIGMA), fd_dinov2=dict(mu=MU2, sigma=SIGMA2))


def npz(save=np.savez, **entries):
    file = io.BytesIO()
    save(file, **entries)
    return file.getvalue()


def with_(**changes):
    """Of EDM's keys and others."""
    return npz(**(dict(mu=MU, sigma=SIGMA) | changes))


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped(compression=zipfile.ZIP_DEFLATED, **members):
    """An archive of raw members, `.npy` by name."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', compression) as archive:
        for name, content in members.items():
            archive.writestr(f'{name}.npy', content)
    return file.getvalue()


def header(dtype, shape):
    """The header of a .npy file that makes such a claim."""
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(text)) + text


def assert_equal(reference, mu, sigma):
    assert reference.mu.dtype == reference.sigma.dtype == np.float64
    np.testing.assert_array_equal(reference.mu, mu)
    np.testing.assert_array_equal(reference.sigma, (sigma.astype(np.float64) + sigma.T) / 2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'reference.npz'


def refused(path, content, entry='fid', load=load_reference):
    """The message by which a file is refused; it names the file, in one line."""
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load(path, *([entry] if load is load_reference else []))
    message = str(error.value)
    assert str(path) in message and '\n' not in message
    return message


# ----------------------------------------------------------------------------
# Ours.


def test_a_reference_comes_back_as_written(path):
    save_reference(path, OURS)
    for entry, reference in OURS.items():
        back = load_reference(path, entry)
        assert_equal(back, reference.mu, reference.sigma)
        for note in ('detector', 'detector_digest', 'num_images', 'resolution'):
            assert getattr(back, note) == getattr(reference, note)
    assert back.features is None
    features = load_reference(path).features
    assert features.dtype == np.float32 and features.flags.writeable
    np.testing.assert_array_equal(features, FEATURES)


def test_edm_reads_the_entry_fid_of_ours(path):
    """EDM's and pytorch-fid's tools look for `mu` and `sigma`."""
    save_reference(path, dict(reversed(OURS.items())))
    with np.load(path, allow_pickle=False) as file:
        np.testing.assert_array_equal(file['mu'], MU)
        np.testing.assert_array_equal(file['sigma'], SIGMA)


def test_features_take_no_memory_before_they_are_used(path):
    save_reference(path, OURS)
    assert isinstance(load_reference(path).features, np.memmap)


def test_a_missing_entry_is_answered_by_those_there_are_and_the_cure(path):
    save_reference(path, {'fid': OURS['fid']})
    message = refused(path, path.read_bytes(), 'fd_dinov2')
    assert 'has no entry fd_dinov2, only fid' in message and 'fid.py ref --metrics=fid,fd_dinov2' in message
    save_reference(path, {'fd_dinov2': OURS['fd_dinov2']})
    assert 'has no entry fid, only fd_dinov2' in refused(path, path.read_bytes())


def test_features_may_be_of_some_of_the_images(path):
    path.write_bytes(with_(features=FEATURES, num_images=50000))
    np.testing.assert_array_equal(load_reference(path).features, FEATURES)


# ----------------------------------------------------------------------------
# Other projects' files.


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
@pytest.mark.parametrize('dtype', [np.float64, np.float32, '>f8'])
def test_edm_and_pytorch_fid_files_are_mu_and_sigma(path, save, dtype):
    mu, sigma = statistics(dtype=dtype)
    path.write_bytes(npz(save, mu=mu, sigma=sigma))
    reference = load_reference(path)
    assert_equal(reference, mu, sigma)
    assert (reference.detector, reference.detector_digest, reference.num_images, reference.resolution) == (
        None,
    ) * 4


def test_a_flat_pickle_is_read_too(path):
    path.write_bytes(pickle.dumps(dict(mu=MU, sigma=SIGMA)))
    assert_equal(load_reference(path), MU, SIGMA)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_openai_references_give_statistics_resolution_and_images(path, save):
    """`arr_0` is a part of the images that `mu` and `sigma` are of, so its length is not their number."""
    images = np.random.default_rng(0).integers(0, 256, (7, 6, 8, 3), dtype=np.uint8)
    path.write_bytes(npz(save, arr_0=images, mu=MU, sigma=SIGMA, mu_s=MU2, sigma_s=SIGMA2))
    reference = load_reference(path)
    assert_equal(reference, MU, SIGMA)
    assert (reference.num_images, reference.resolution) == (None, '8x6x3')
    found = reference_images(path)
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, images)


def test_openai_images_are_not_read_for_the_statistics(path):
    """32 MB of them: what is allocated on the way stays below one."""
    path.write_bytes(npz(arr_0=np.zeros([8, 1024, 1365, 3], np.uint8), mu=MU, sigma=SIGMA))
    tracemalloc.start()
    assert load_reference(path).resolution == '1365x1024x3'
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def test_other_references_have_no_images(path):
    for content in (npz(mu=MU, sigma=SIGMA), pickle.dumps(EDM2)):
        path.write_bytes(content)
        assert reference_images(path) is None


IMAGES = np.zeros([2, 4, 4, 3], np.uint8)


@pytest.mark.parametrize(
    'content, statistics',
    [
        (with_(), True),
        (with_(arr_0=IMAGES), True),
        (pickle.dumps(EDM2), True),
        (npz(**{'fd_dinov2.mu': MU2}), True),
        (npz(mu=MU), True),
        (npz(), True),
        (npz(arr_0=IMAGES), False),
        (npz(images=IMAGES, labels=np.zeros(2)), False),
    ],
)
def test_statistics_are_told_from_images(path, content, statistics):
    """What is neither counts as statistics, whose reader says what is wrong."""
    path.write_bytes(content)
    assert holds_statistics(path) == statistics
    assert (
        not holds_statistics(path.parent)
        and not holds_statistics('images.zip')
        and not holds_statistics('images.NPY')
    )


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_edm2_pickles_have_both_entries_and_the_number_of_images(tmp_path, protocol):
    """Sigma in Fortran's order, and FP32 as well; protocol 2 writes bytes as text, 5 arrays as buffers."""
    path = tmp_path / 'img512.pkl'
    stats = EDM2 | dict(fd_dinov2=dict(mu=MU2.astype('f4'), sigma=np.asfortranarray(SIGMA2.astype('f4'))))
    path.write_bytes(pickle.dumps(stats, protocol))
    fid, dinov2 = (load_reference(path, entry) for entry in ('fid', 'fd_dinov2'))
    assert_equal(fid, MU, SIGMA)
    assert_equal(dinov2, stats['fd_dinov2']['mu'], stats['fd_dinov2']['sigma'])
    assert (fid.num_images, dinov2.num_images, fid.detector, fid.resolution) == (50000, 50000, None, None)


def test_edm2_pickles_of_old_numpy_and_with_easydicts_are_read(tmp_path):
    """Before NumPy 2 the module was called numpy.core; EDM2's own dicts may be `dnnlib.util.EasyDict`."""
    content = pickle.dumps(EDM2 | dict(fid=EasyDict(EDM2['fid'])), protocol=3).replace(
        b'numpy._core', b'numpy.core'
    )
    assert b'numpy.core.multiarray' in content and b'EasyDict' in content
    (tmp_path / 'old.pkl').write_bytes(content)
    assert_equal(load_reference(tmp_path / 'old.pkl'), MU, SIGMA)


def test_pickled_arrays_of_either_order_are_read(tmp_path):
    """Sigma would not tell: it is symmetric."""
    for order in 'CF':
        stats = dict(mu=MU, sigma=SIGMA, features=np.array(FEATURES, order=order))
        for protocol in (4, 5):
            (tmp_path / 'more.pkl').write_bytes(pickle.dumps(dict(fid=stats), protocol))
            np.testing.assert_array_equal(load_reference(tmp_path / 'more.pkl').features, FEATURES)


def test_large_pickled_arrays_are_read_from_their_place(tmp_path):
    """More than 255 bytes are left in the file by the reader of pickles."""
    mu, sigma = statistics(dim=64)
    (tmp_path / 'large.pkl').write_bytes(pickle.dumps(dict(other=sigma, fid=dict(mu=mu, sigma=sigma))))
    assert_equal(load_reference(tmp_path / 'large.pkl'), mu, sigma)


# ----------------------------------------------------------------------------
# What is refused.

BAD_SIGMA = {name: SIGMA.copy() for name in ('nan', 'crooked', 'negative')}
BAD_SIGMA['nan'][1, 1] = np.nan
BAD_SIGMA['crooked'][0, 1] += 1
BAD_SIGMA['negative'][3, 3] = -1
BAD_FEATURES = FEATURES.copy()
BAD_FEATURES[8, 0] = np.inf


@pytest.mark.parametrize(
    'content, words',
    [
        (with_(mu=np.full(DIM, np.inf)), ': mu has values that are NaN or infinite'),
        (with_(sigma=BAD_SIGMA['nan']), ': sigma has values that are NaN or infinite'),
        (with_(sigma=BAD_SIGMA['crooked']), ': sigma: the covariance is not symmetric'),
        (
            with_(sigma=BAD_SIGMA['negative']),
            ': sigma is not a covariance: feature 3 has a negative variance',
        ),
        (with_(sigma=SIGMA2), ': a mean of shape [5] does not match sigma of shape [3, 3]'),
        (with_(mu=SIGMA), ': a mean of shape [5, 5] does not match sigma'),
        (with_(mu=np.zeros(0), sigma=np.zeros((0, 0))), ': a mean of shape [0]'),
        (with_(mu=MU.astype(complex)), ': mu is not a readable plain array'),
        (with_(mu=np.array(['a'] * DIM)), ': mu has type <U1, not real numbers'),
        (npz(mu=MU), ' has no sigma (it holds mu)'),
        (npz(sigma=SIGMA), ' has no mu (it holds sigma)'),
        (npz(arr_0=np.zeros([2, 4, 4, 3], np.uint8)), ' has no mu and no sigma (it holds arr_0)'),
        (with_(num_images=-5), ': num_images is not a number of images'),
        (with_(num_images=0), ': num_images is not a number of images'),
        (with_(num_images=7.5), ': num_images is not a number of images'),
        (with_(num_images=np.array('many')), ': num_images is not a number of images'),
        (with_(num_images=[5, 6]), ': num_images is not a number of images'),
        (with_(detector=3), ': detector is not text'),
        (with_(resolution='large'), ": resolution is 'large', not width x height x channels"),
        (with_(features=FEATURES[:, :4]), ': features is float32 [9, 4]; expected float32 [at most N, 5]'),
        (
            with_(features=FEATURES, num_images=8),
            ': features is float32 [9, 5]; expected float32 [at most 8, 5]',
        ),
        (with_(features=BAD_FEATURES), ': features has values that are NaN or infinite'),
        (with_(features=FEATURES.astype(np.int32)), ': features is int32'),
        (with_(arr_0=np.zeros([2, 4, 4, 3])), ': arr_0 is float64 [2, 4, 4, 3], not images'),
        (with_(arr_0=np.zeros([2, 4, 4], np.uint8)), ': arr_0 is uint8 [2, 4, 4], not images'),
    ],
)
def test_bad_values_are_refused_by_file_and_key(path, content, words):
    assert f'{path}{words}' in refused(path, content)


def test_bad_values_of_another_entry_are_refused_by_its_key(path):
    content = npz(mu=MU, sigma=SIGMA, **{'fd_dinov2.mu': MU2, 'fd_dinov2.sigma': SIGMA2 * np.nan})
    assert ': fd_dinov2.sigma has values that are NaN' in refused(path, content, 'fd_dinov2')
    load_reference(path)


class Bomb:
    def __reduce__(self):
        return exec, ('raise SystemExit("code ran")',)


@pytest.mark.parametrize(
    'content, words',
    [
        (b'', 'is neither an .npz file'),
        (b'mu = 0', 'is neither an .npz file'),
        (with_()[:-40], 'is not a complete .npz file'),
        (
            with_(mu=np.array([Bomb()], dtype=object)),
            ': mu is not a readable plain array: it holds values of type object',
        ),
        (with_(num_images=np.array(Bomb(), dtype=object)), ': num_images is not a readable plain array'),
        (zipped(mu=b'\x93NUMPY\x01\x00', sigma=npy(SIGMA)), ': mu is not a readable plain array'),
        (zipped(mu=b'junk', sigma=npy(SIGMA)), ': mu is not a readable plain array'),
        (
            zipped(mu=npy(MU), sigma=npy(SIGMA)[:-8]),
            ': sigma is not a readable plain array: its header says float64 [5, 5]',
        ),
        (
            zipped(mu=npy(MU) + b'more', sigma=npy(SIGMA)),
            ': mu is not a readable plain array: its header says float64 [5]',
        ),
        (
            zipped(mu=header('<f8', (-1,)), sigma=npy(SIGMA)),
            ': mu is not a readable plain array: its shape is [-1]',
        ),
        (zipped(mu=header('<f8', '(' * 5000), sigma=npy(SIGMA)), ': mu is not a readable plain array'),
        (zipped(mu=header('<f8', '(' * 50000), sigma=npy(SIGMA)), ': mu is not a readable plain array'),
        (zipped(mu=header('<U0', (3,)), sigma=npy(SIGMA)), ': mu is not a readable plain array'),
    ],
)
def test_damaged_and_hostile_archives_are_refused_by_name(path, content, words):
    assert f'{path}{words}' in refused(path, content) or f'{path} {words}' in refused(path, content)


def test_a_flipped_bit_is_found_by_the_checksum(path):
    """In the values of mu, sigma and features, which would still be numbers; features are too many to be read by accident with their header."""
    features = np.random.default_rng(0).normal(size=(2000, DIM)).astype(np.float32)
    for key, values in dict(mu=MU, sigma=SIGMA, features=features).items():
        content = bytearray(with_(features=features))
        content[content.index(values.tobytes())] ^= 1
        assert f': {key} is not a readable plain array: Bad CRC-32' in refused(path, bytes(content))


def test_two_arrays_of_one_name_are_refused(path):
    file = io.BytesIO(with_())
    with zipfile.ZipFile(file, 'a') as archive, pytest.warns(UserWarning):
        archive.writestr('mu.npy', npy(MU + 1))
    assert 'has two arrays called mu' in refused(path, file.getvalue())


@pytest.mark.parametrize(
    'members',
    [
        dict(mu=header('<f8', (1 << 60,)), sigma=npy(SIGMA)),
        dict(mu=npy(MU), sigma=header('<f8', (5, 5)) + bytes(200 << 20)),
        dict(mu=header('<f8', (25 << 20,)) + bytes(200 << 20), sigma=npy(SIGMA)),
    ],
)
def test_no_memory_is_taken_on_a_headers_word(path, members):
    """Claims of 2^63 bytes, and 200 MB of zeros in 200 kB: refused before a megabyte is allocated."""
    content = zipped(**members)
    del members
    tracemalloc.start()
    assert 'is not a readable plain array' in refused(path, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


@pytest.mark.parametrize('protocol', [2, 5])
def test_a_pickle_that_would_run_code_is_refused_by_what_it_names(tmp_path, protocol):
    path = tmp_path / 'img512.pkl'
    for hostile in (Bomb(), dict(fid=Bomb()), EDM2 | dict(extra=Bomb())):
        message = refused(path, pickle.dumps(hostile, protocol))
        assert 'builtin' in message and 'exec' in message and 'nothing was executed' in message


def pickled(**changes):
    return pickle.dumps(EDM2 | dict(fid=EDM2['fid'] | changes))


@pytest.mark.parametrize(
    'content, words',
    [
        (pickled(sigma=BAD_SIGMA['nan']), ': sigma has values that are NaN'),
        (pickled(sigma=SIGMA2), ': a mean of shape [5] does not match sigma of shape [3, 3]'),
        (pickled(sigma=None), ': sigma is not a readable plain array'),
        (pickled(sigma=[1, [2]]), ': sigma is not a readable plain array'),
        (pickled(mu=MU.astype(object)), ': mu is not a readable plain array'),
        (pickled(num_images='many'), ': num_images is not a number of images'),
        (pickle.dumps(dict(fid=dict(mu=MU))), ' has no sigma'),
        (pickle.dumps([MU, SIGMA]), ' has no mu and no sigma'),
        (pickle.dumps(EDM2)[:-100], ' cannot be read'),
        (b'\x80\x04.', ' cannot be read'),
    ],
)
def test_bad_pickles_are_refused_by_file_and_key(tmp_path, content, words):
    path = tmp_path / 'img512.pkl'
    assert f'{path}{words}' in refused(path, content)


def test_a_pickled_shape_that_its_bytes_do_not_fill_is_refused(tmp_path):
    """The shape (5, 5) of sigma in the file becomes (5, 4)."""
    content = bytearray(pickle.dumps(dict(fid=dict(mu=MU, sigma=SIGMA))))
    shapes = [
        place
        for (first, a, _), (second, b, place) in itertools.pairwise(pickletools.genops(bytes(content)))
        if (first.name, a, second.name, b) == ('BININT1', DIM, 'BININT1', DIM)
    ]
    content[shapes[0] + 1] = 4
    assert 'says float64 [5, 4], and has 200 bytes' in refused(tmp_path / 'short.pkl', bytes(content))


def test_images_of_a_reference_that_are_none_are_refused(path):
    for images in (np.zeros([2, 4, 4]), np.zeros([2, 4, 4, 4], np.uint8)):
        assert ': arr_0 is ' in refused(path, with_(arr_0=images), load=reference_images)


# ----------------------------------------------------------------------------
# Whose references they are.


def detector(dim=DIM, digest='a' * 64):
    return SimpleNamespace(name='inception', digest=digest, dim=dim)


def test_another_detectors_reference_is_refused_and_an_unknown_one_noted(capsys):
    with pytest.raises(UserError, match=r'r\.npz was made with detector inception'):
        check_same_detector(OURS['fid'], detector(digest='c' * 64), 'r.npz')
    check_same_detector(OURS['fid'], detector(), 'r.npz')
    check_same_detector(OURS['fid'], detector(dim=None), 'r.npz')
    assert capsys.readouterr().err == ''
    check_same_detector(Reference(MU, SIGMA), detector(), 'r.npz')
    assert 'does not record its detector; assuming inception' in capsys.readouterr().err
    with pytest.raises(UserError, match='has 5 features, but detector inception returns 3'):
        check_same_detector(Reference(MU, SIGMA), detector(dim=3), 'r.npz')


def test_another_resolution_is_warned_of_and_channels_are_none(capsys):
    """OURS is of images 8 wide and 6 high."""
    for shape in ([3, 6, 8], [1, 6, 8], None):
        check_same_detector(OURS['fid'], detector(), 'r.npz', shape)
    assert capsys.readouterr().err == ''
    check_same_detector(OURS['fid'], detector(), 'r.npz', [3, 8, 6])
    assert 'r.npz is of 8x6 images, but these are 6x8' in capsys.readouterr().err


@pytest.mark.parametrize(
    'source, sha256, word',
    [
        (
            INCEPTION_URL,
            None,
            'has 5 features of detector inception, but detector inception-2015-12-05 returns 2048',
        ),
        (DINOV2, None, 'has 5 features of detector inception, but detector dinov2 returns 1024'),
        ('https://example.com/other.pt', 'C' * 64, 'was made with detector inception'),
        (f'other.pt#sha256={"c" * 64}', None, 'was made with detector inception'),
        (f'other.pt#sha256={"A" * 64}', None, None),
        ('other.pt', None, None),
        ('dinov2:folder', None, None),
    ],
)
def test_what_is_known_of_a_detector_is_checked_before_it_is_there(source, sha256, word):
    if word is None:
        return check_before_download(OURS['fid'], 'r.npz', source, sha256)
    with pytest.raises(UserError, match=word):
        check_before_download(OURS['fid'], 'r.npz', source, sha256)


def test_fid_refuses_another_detectors_reference_before_inception_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(detectors, 'local_path', lambda *_, **__: pytest.fail('it was looked for'))
    save_reference(tmp_path / 'r.npz', OURS)
    result = helpers.invoke(fid.main, 'calc', f'--images={tmp_path}', f'--ref={tmp_path / "r.npz"}')
    helpers.assert_one_clear_error(result, '--ref', 'has 5 features', 'returns 2048')
