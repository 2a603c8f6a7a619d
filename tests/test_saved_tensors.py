"""PyTorch's files of strangers: what they claim is compared with what they have, and nothing in them runs."""

import io
import pickle
import resource
import zipfile

import pytest
import torch

from torch_utils.restricted_pickle import Call, MalformedPickle
from torch_utils.saved_tensors import check_saved, read_saved

CONTENTS = dict(
    a=torch.arange(6.0).view(2, 3),
    half=torch.ones(3, dtype=torch.float16),
    empty=torch.empty(0),
    number=torch.tensor(7),
    turned=torch.arange(6).view(2, 3).t(),
    parameter=torch.nn.Parameter(torch.ones(2)),
    plain=[1, -2.5, None, True, 'text', b'bytes', (1, (2,)), 10**30],
    state={0: {0.5: 1}},
    shape=torch.Size([1, 2]),
)
FLAT = torch.arange(10.0)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize('new', [True, False])
def test_tensors_and_plain_data_are_read_as_pytorch_reads_them(tmp_path, new):
    torch.save(
        dict(CONTENTS, views=[FLAT[:4], FLAT[4:]]), tmp_path / 'x.pt', _use_new_zipfile_serialization=new
    )
    with open(tmp_path / 'x.pt', 'rb') as file:
        found = read_saved(file)
    views = found.pop('views')
    assert same(dict(CONTENTS, parameter=CONTENTS['parameter'].data, shape=(1, 2)), found)
    assert torch.equal(torch.cat(views), FLAT) and views[0].untyped_storage().nbytes() == 16


def test_what_is_neither_is_inert(tmp_path):
    torch.save(dict(x=torch.ones(3).to_sparse()), tmp_path / 'x.pt')
    with open(tmp_path / 'x.pt', 'rb') as file:
        assert isinstance(read_saved(file)['x'], Call)


class Bytes:
    """Pickles as a call of `bytearray`, which PyTorch's own reader makes, however large."""

    def __init__(self, size):
        self.size = size

    def __reduce__(self):
        return bytearray, (self.size,)


def rezipped(path, change):
    """The members of a file after `change(members)`, stored again."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def claim(number):
    """Have the tensor of four numbers claim so many."""

    def change(members):
        name = next(name for name in members if name.endswith('data.pkl'))
        assert members[name].count(b'K\x04') == 2
        members[name] = members[name].replace(b'K\x04', b'\x8a\x06' + number.to_bytes(6, 'little'))

    return change


def without_storage(members):
    del members[next(name for name in members if '/data/' in name)]


def with_more(size):
    def change(members):
        members['x/data.pkl'] = members.pop('x/data.pkl') + bytes(size)

    return change


@pytest.mark.parametrize(
    'contents, change, words',
    [
        ([Bytes(1 << 40)], None, 'bytearray'),
        (dict(a=FLAT[:4].clone()), claim(1 << 40), 'storage'),
        (dict(a=FLAT[:4].clone()), claim(5), 'storage'),
        (dict(a=FLAT[:4].clone()), without_storage, 'storage'),
        (dict(a=1), with_more(17 << 20), 'has at most'),
        ({(1, 2): 3}, None, 'neither text nor a number'),
    ],
)
@pytest.mark.parametrize('read', [read_saved, check_saved])
def test_claims_beyond_the_file_are_refused_before_memory_is_taken(tmp_path, contents, change, words, read):
    torch.save(contents, tmp_path / 'x.pt')
    if change:
        rezipped(tmp_path / 'x.pt', change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(tmp_path / 'x.pt', 'rb') as file, pytest.raises(MalformedPickle, match=words):
        read(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


def test_the_same_tensor_a_thousand_times_is_refused(tmp_path):
    """They would be a thousand tensors in memory of their own."""
    big = torch.zeros(1 << 16)
    torch.save([big.view(1 << j, -1) for j in range(17)], tmp_path / 'x.pt')
    with open(tmp_path / 'x.pt', 'rb') as file, pytest.raises(MalformedPickle, match='share memory'):
        read_saved(file)


@pytest.mark.parametrize('depth', [100, 200_000])
def test_nesting_without_end_is_refused(tmp_path, depth):
    data = b'\x80\x02' + b']' * depth + b'a' * (depth - 1) + b'.'
    with zipfile.ZipFile(tmp_path / 'x.pt', 'w') as archive:
        archive.writestr('x/data.pkl', data)
    with open(tmp_path / 'x.pt', 'rb') as file, pytest.raises(MalformedPickle, match='without end'):
        read_saved(file)


def test_lists_that_hold_a_list_many_times_take_no_time(tmp_path):
    """2^30 entries for whoever follows them all."""
    many = [1]
    for _ in range(30):
        many = [many, many]
    torch.save(many, tmp_path / 'x.pt')
    with open(tmp_path / 'x.pt', 'rb') as file:
        found = read_saved(file)
    assert found[0] is found[1]


@pytest.mark.parametrize(
    'make',
    [
        lambda good: good[: len(good) // 2],
        lambda good: good[:-1],
        lambda good: b'',
        lambda good: b'PK\5\6' + bytes(18),
        lambda good: good + b'x',
        lambda good: pickle.dumps([1]),
        lambda good: bytes(1000),
        lambda good: b'\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.',
    ],
    ids=range(8),
)
@pytest.mark.parametrize('new', [True, False])
def test_files_that_are_cut_off_or_of_another_kind_are_refused(tmp_path, make, new):
    buffer = io.BytesIO()
    torch.save(CONTENTS, buffer, _use_new_zipfile_serialization=new)
    (tmp_path / 'x.pt').write_bytes(make(buffer.getvalue()))
    with open(tmp_path / 'x.pt', 'rb') as file:
        try:
            found = read_saved(file)
        except MalformedPickle:
            return
    assert (
        not new and make(b'1') == b'1x' and same(found['a'], CONTENTS['a'])
    )  # what follows the storages of an old file is nobody's


def test_two_entries_whose_names_differ_in_case_are_refused(tmp_path):
    """Another reader may take the other one."""
    torch.save(CONTENTS, tmp_path / 'x.pt')
    rezipped(tmp_path / 'x.pt', lambda members: members.update({'x/DATA.pkl': b''}))
    with open(tmp_path / 'x.pt', 'rb') as file, pytest.raises(MalformedPickle, match='two entries'):
        read_saved(file)
