"""Times, learning rates, statistics, rulers, and the command-line types."""

import gc
import json
import os
import platform
import weakref

import click
import pytest
import torch
from click.testing import CliRunner
from helpers import assert_one_clear_error, run, run_python, run_ranks

from dnnlib import EasyDict, UserError, cli
from metrics import small_detectors
from torch_utils import misc, training_stats
from training.tick_stats import compact_time
from training.weight_update import learning_rate


@pytest.mark.parametrize(
    'seconds, text', [(0.4, '0s'), (59.6, '1m00s'), (3599, '59m59s'), (3600, '1h00m'), (90_061, '1d01h')]
)
def test_times_are_for_people(seconds, text):
    assert compact_time(seconds) == text


def test_the_learning_rate_ramps_up_and_decays():
    c = EasyDict(lr=2.0, total_nimg=1000, lr_rampup_nimg=100, lr_ref_nimg=0)
    rate = lambda nimg, schedule, **others: learning_rate(EasyDict(c, lr_schedule=schedule, **others), nimg)
    assert [rate(n, 'constant') for n in (0, 50, 100, 1000)] == [0, 1, 2, 2]
    assert [rate(n, 'linear') for n in (50, 100, 500, 1000)] == pytest.approx([0.95, 1.8, 1, 0])
    assert [rate(n, 'cosine') for n in (500, 1000)] == pytest.approx([1, 0])
    assert (
        rate(0, 'constant', lr_rampup_nimg=0) == 2
        and learning_rate(EasyDict(c, lr_schedule='cosine'), 500, 8.0) == 4
    )
    edm2 = lambda nimg: rate(nimg, 'sqrt', lr_ref_nimg=200)
    assert [edm2(n) for n in (0, 50, 200, 800, 1800)] == pytest.approx([0, 1, 2, 1, 2 / 3])


FAULTS = """
import ctypes, resource, sys
from torch_utils import misc
if sys.argv[1] == 'kept':
    misc.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.memset.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
def step():
    blocks = [libc.malloc(1 << 19) for _ in range(40)]
    for block in blocks:
        libc.memset(block, 1, 1 << 19)
    for block in reversed(blocks):
        libc.free(block)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step(), step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason="of glibc's allocator")
def test_freed_memory_is_kept_for_what_comes_next():
    """20 MiB are 5,120 pages, ten times."""
    faults = {mode: int(run_python('-c', FAULTS, mode).stdout) for mode in ('given back', 'kept')}
    assert faults['kept'] < 100 and faults['given back'] > 10_000, faults


def test_deterministic_algorithms_can_be_demanded():
    try:
        misc.use_deterministic_algorithms(True)
        assert torch.are_deterministic_algorithms_enabled() and os.environ['CUBLAS_WORKSPACE_CONFIG']
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        misc.use_deterministic_algorithms(False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_garbage_is_collected_at_certain_steps_alone():
    class Cycle:
        def __init__(self):
            self.me = self

    with misc.garbage_by_hand(every=10) as collect:
        assert not gc.isenabled()
        alive = weakref.ref(Cycle())
        collect(9)
        assert alive() is not None
        collect(10)
        assert alive() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_statistics_are_moments_and_start_anew_after_each_collection():
    training_stats.reset()
    training_stats.report('a', torch.tensor([1.0, 2.0]))
    training_stats.report('a', 6)
    training_stats.report(['b', 'c'], torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    training_stats.report_bins(
        ['low', 'high', 'none'], torch.tensor([0, 1, 0]), torch.tensor([1.0, 5.0, 3.0])
    )
    stats = training_stats.collect()
    assert stats['a'] == dict(num=3, mean=3.0, std=pytest.approx((14 / 3) ** 0.5))
    assert stats['b']['mean'] == 2 and stats['c'] == dict(num=2, mean=20.0, std=10.0)
    assert (
        stats['low'] == dict(num=2, mean=2.0, std=1.0) and stats['high']['num'] == 1 and 'none' not in stats
    )
    assert training_stats.collect() == {}


def test_statistics_of_processes_add_up(tmp_path):
    script = tmp_path / 'stats.py'
    script.write_text(
        'import json, torch\nfrom torch_utils import distributed, training_stats\ndistributed.init()\n'
        'rank = distributed.get_rank()\n'
        'training_stats.report("a", torch.arange(3.0) + 3 * rank)\nstats = training_stats.collect()\n'
        'distributed.print0(json.dumps(stats))\ndistributed.shutdown()\n'
    )
    stats = json.loads(run_ranks(2, script, env=dict(PYTHONPATH='.')).stdout)
    assert stats['a']['num'] == 6 and stats['a']['mean'] == 2.5


@click.command(cls=cli.Command)
@cli.option('--seeds', type=cli.IntRanges(), group='Numbers')
@cli.option('--widths', type=cli.NumberList(cli.FACTOR), group='Numbers')
@click.option('--fail', is_flag=True)
def command(seeds, widths, fail):
    if fail:
        raise UserError('a cause, and a cure')
    click.echo(json.dumps([seeds, widths]))


def test_lists_and_ranges_are_understood():
    result = CliRunner().invoke(command, ['--seeds=1,3-5', '--widths=0.05,0.1'])
    assert json.loads(result.output) == [[1, 3, 4, 5], [0.05, 0.1]]
    assert json.loads(CliRunner().invoke(command, ['--widths=none']).output) == [None, []]


def test_a_user_error_is_one_line_with_status_1():
    assert_one_clear_error(CliRunner().invoke(command, ['--fail']), 'a cause, and a cure')


def test_help_groups_options():
    output = CliRunner().invoke(command, ['--help']).output
    assert (
        output.index('Numbers:') < output.index('--seeds') < output.index('Options:') < output.index('--fail')
    )


def test_an_easy_dict_has_attributes_and_json():
    d = EasyDict(a=1)
    d.b = 2
    assert (d.a, d['b'], json.dumps(d)) == (1, 2, '{"a": 1, "b": 2}')
    del d.a
    with pytest.raises(AttributeError):
        _ = d.a


def test_rulers_are_scripted_detectors_and_the_classifier_knows_digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images * 255 / 16).round().to(torch.uint8)[:, None]
    made, accuracy = small_detectors.make_detectors(images, torch.from_numpy(data.target), 10)
    assert accuracy > 0.95
    for name, detector in made.items():
        features = detector(images[:7])
        assert features.shape == (7, small_detectors.FEATURES) and features.dtype == torch.float32, name
    pca = made['pca'](images)
    assert pca.mean(dim=0).abs().max() < 1e-3
    covariance = torch.cov(pca.T.double())
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-4 * covariance.max()


def test_rulers_need_labels(tmp_path):
    from PIL import Image

    Image.new('L', (8, 8)).save(tmp_path / 'a.png')
    assert_one_clear_error(
        run('-m', 'metrics.small_detectors', f'--data={tmp_path}', f'--outdir={tmp_path / "x"}', check=False),
        'no labels',
    )
