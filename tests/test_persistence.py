"""Persistent objects: what they remember, how they pickle and copy, and that EDM's own way of loading rebuilds them."""

import copy
import pickle
import pickletools
import time
from pathlib import Path

import pytest
import torch
from stock_edm import assert_stock_edm_agrees
from teachers import TEACHERS, new_teacher

from torch_utils import persistence
from training import networks
from training.checkpoint import save_snapshot


@persistence.persistent_class
class Shelf(torch.nn.Module):
    def __init__(self, widths, depth=1):
        super().__init__()
        self.widths = widths
        widths.append(depth)


@persistence.persistent_class
class Bookshelf(Shelf):
    def __init__(self, books):
        super().__init__([1, 2], depth=books)


class Undecorated(Shelf):
    pass


def small_net(**kwargs):
    torch.manual_seed(0)
    options = dict(
        model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], model_type='DhariwalUNet'
    )
    net = networks.EDMPrecond(8, 1, label_dim=3, **{**options, **kwargs})
    for parameter in net.parameters():  # the output layers start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval().requires_grad_(False)


def test_arguments_are_remembered_as_they_were_given_even_if_the_constructor_alters_them():
    shelf = Shelf([3], depth=4)
    assert shelf.widths == [3, 4]
    assert shelf.init_args == ([3],) and shelf.init_kwargs == {'depth': 4}


def test_only_the_outermost_constructor_records_its_arguments():
    shelf = Bookshelf(7)
    assert shelf.init_args == (7,) and shelf.init_kwargs == {}


def test_altering_the_returned_arguments_does_not_alter_the_record():
    shelf = Shelf([3])
    shelf.init_args[0].append(9)
    assert shelf.init_args == ([3],)


def test_an_undecorated_subclass_cannot_be_pickled_under_the_name_of_its_base():
    with pytest.raises(TypeError, match='Undecorated'):
        pickle.dumps(Undecorated([1]))


def test_pickles_are_in_version_6_of_the_format_and_carry_the_source_once():
    function, (meta,) = small_net().__reduce__()
    assert (
        function.__module__ == 'torch_utils.persistence'
        and function.__name__ == '_reconstruct_persistent_obj'
    )
    assert (meta['type'], meta['version'], meta['class_name']) == ('class', 6, 'EDMPrecond')
    assert meta['module_src'] == Path(networks.edm.__file__).read_text()
    assert pickle.dumps(small_net()).count(b'class DhariwalUNet(') == 1


def test_pickles_name_nothing_but_what_edm_snapshots_name():
    names, strings = set(), []
    for opcode, argument, _ in pickletools.genops(pickle.dumps(small_net(), protocol=2)):
        strings.append(argument)
        if opcode.name == 'GLOBAL':
            names.add(argument.replace(' ', '.'))
    assert names == {
        'torch_utils.persistence._reconstruct_persistent_obj',
        'collections.OrderedDict',
        'torch._utils._rebuild_parameter',
        'torch._utils._rebuild_tensor_v2',
        'torch.storage._load_from_bytes',
        '_codecs.encode',
        'torch.nn.modules.container.ModuleDict',
        '__builtin__.set',
    }


def test_metadata_stays_with_copies_and_out_of_pickles():
    net = small_net()
    net.metadata = {'objective': 'mcd'}
    twin = copy.deepcopy(net)
    twin.metadata['objective'] = 'other'
    assert net.metadata == {'objective': 'mcd'} and twin.metadata == {'objective': 'other'}
    assert 'metadata' not in net.__reduce__()[1][0]['state']


@pytest.mark.parametrize(
    'duplicate',
    [copy.deepcopy, copy.copy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=['deepcopy', 'copy', 'pickle'],
)
def test_duplicates_within_a_process_are_of_the_same_class_and_give_the_same_output(duplicate):
    net = small_net()
    twin = duplicate(net)
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0]), torch.eye(3)[:2]
    assert type(twin) is networks.EDMPrecond and twin.init_kwargs == net.init_kwargs
    assert torch.equal(net(x, sigma, labels), twin(x, sigma, labels))


def test_a_deep_copy_shares_no_tensor_and_is_quick():
    net = small_net()
    start = time.perf_counter()
    twin = copy.deepcopy(net)
    assert time.perf_counter() - start < 1
    assert not {tensor.data_ptr() for tensor in net.parameters()} & {
        tensor.data_ptr() for tensor in twin.parameters()
    }


def test_source_that_is_not_ours_is_never_executed(tmp_path):
    """A class of the right name with another source, which would leave a file behind if anything ran it."""
    function, (meta,) = small_net().__reduce__()
    meta['module_src'] += f'\nopen({str(tmp_path / "canary")!r}, "w")'
    with pytest.raises(pickle.UnpicklingError, match='never executed'):
        function(meta)
    assert not (tmp_path / 'canary').exists()


def test_stock_edm_loads_our_snapshots_of_every_kind_with_nothing_of_ours_at_hand(tmp_path):
    given = dict(x=torch.randn(2, 1, 8, 8), sigma=torch.tensor([0.5, 2.0]), labels=torch.eye(10)[:2])
    nets = {}
    for i, kind in enumerate(TEACHERS):
        nets[f'{i}'] = new_teacher(TEACHERS[kind], tmp_path / f'{i}.pkl').train().requires_grad_(True)
        save_snapshot(tmp_path / f'{i}.pkl', nets[f'{i}'], objective='mcd', dataset_kwargs={'resolution': 8})
    assert_stock_edm_agrees(tmp_path, nets, given)
