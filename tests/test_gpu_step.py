"""Steps, sampling and validation on a GPU wait for nothing, as seen on a stand-in for one; and that it sees what does wait."""

import json
import re

import pytest
import torch
from helpers import ROOT, run_python

from benchmarks import gpu_stand_in
from benchmarks.__main__ import read_blocks
from training.objectives import OBJECTIVES

if reason := gpu_stand_in.why_unavailable():
    pytest.skip(reason, allow_module_level=True)

from gpu_steps import CASES, TRAINING, WAITS

# In the fast suite: one of each way to make targets, to sample, and to hold memory.
OFTEN = {
    *('diffusion', 'mcd', 'flowmap', 'ect', 'mm', 'validation'),
    *(
        'generate adm heun',
        'generate adm student',
        'generate two networks cm',
        'generate adm guided by itself heun',
    ),
    *('memory: plain', 'memory: a teacher'),
}
OF_STEPS = [case for case in CASES if case in TRAINING or case.startswith(('generate', 'validation'))]
OF_MEMORY = [case for case in CASES if case.startswith('memory: ')]
SELDOM = [case for case in (*OF_STEPS, *OF_MEMORY) if case not in OFTEN]


def marked(cases):
    return [pytest.param(case, marks=pytest.mark.slow) if case in SELDOM else case for case in cases]


def on_stand_in(*arguments) -> dict:
    """What `gpu_steps` finds, in a process of its own."""
    program = run_python('-m', 'tests.gpu_steps', *arguments, env=gpu_stand_in.guarded_environment())
    return json.loads(program.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def found(digits, tmp_path_factory) -> dict:
    """What one process finds in the cases of the fast suite."""
    return on_stand_in(
        digits, tmp_path_factory.mktemp('gpu'), *(case for case in CASES if case not in SELDOM)
    )


@pytest.fixture(scope='module')
def found_seldom(digits, tmp_path_factory) -> dict:
    return on_stand_in(digits, tmp_path_factory.mktemp('gpu'), *SELDOM)


@pytest.fixture
def found_in_case(request):
    """A function: what was found in a case, by the process that has it."""
    return lambda case: request.getfixturevalue('found_seldom' if case in SELDOM else 'found')[case]


def test_every_objective_has_a_case():
    assert CASES.keys() >= OFTEN
    assert {case.partition(',')[0] for case in TRAINING} == set(OBJECTIVES)


@pytest.mark.parametrize('case', marked(OF_STEPS))
def test_the_host_waits_for_nothing_and_no_devices_are_mixed(case, found_in_case):
    """Of sampling and validation, in the batches after the first."""
    assert found_in_case(case) == []


def test_channels_last_is_ignored_where_group_normalization_would_undo_it(found):
    compiled = {'adm, compiled': True, 'edm2, compiled': True}
    assert found['channels last'] == dict(adm=False, edm2=True) | compiled


@pytest.mark.parametrize('case', marked(OF_MEMORY))
def test_the_peak_of_a_step_is_what_a_dry_run_says(case, found_in_case):
    """Within 5 %, which are temporary tensors: of a run as train.py sets it up, in its second step."""
    said, peak = found_in_case(case).values()
    assert peak == pytest.approx(said, rel=0.05)


# ----------------------------------------------------------------------------
# The stand-in itself.


@pytest.mark.parametrize('name', WAITS)
def test_a_wait_is_found_with_its_line(name, found):
    (line,) = found[f'wait: {name}']
    assert line.startswith(f'1 x {WAITS[name][1]} at tests/gpu_steps.py:')


def test_what_does_not_wait_is_not_found(found):
    assert found['no wait'] == []


def test_mixed_devices_are_found(found):
    (line,) = found['mixed devices']
    assert line.startswith('1 x add: Expected all tensors to be on the same device')


def test_kernels_and_memory_are_counted(found):
    """A convolution with a bias is two kernels, views are none; storages are rounded to 512 bytes and freed."""
    counted = found['counts']
    assert counted['kernels'] == dict(convolution=2) and counted['layouts'] == dict(NCHW=1)
    inputs, output = 2 * 4 * 64 * 4 + 1024 + 512, 2 * 4 * 64 * 4
    assert (counted['with output'], counted['without'], counted['peak']) == (
        inputs + output,
        inputs,
        inputs + output,
    )


def test_everything_is_put_back():
    before = torch.Generator, torch.cuda.is_available, torch.nn.Module._apply
    with gpu_stand_in.gpu():
        assert torch.cuda.is_available()
    assert before == (torch.Generator, torch.cuda.is_available, torch.nn.Module._apply)
    assert not torch.cuda.is_available()


def test_the_page_has_the_kernels_of_a_step(found):
    """Of the demo's network, by part; 2 % is left to small changes."""
    parts = found['kernels']['parts']
    assert sum(parts.values()) == 2 * parts['total'] and found['kernels']['waits'] == []
    # Two passes of the teacher, and two of the student.
    assert parts['teacher hop'] == 2 * parts['self-target'] == 2 * parts['student forward']
    page = read_blocks(ROOT / 'benchmarks' / 'RESULTS.md')['kernels']
    total = re.search(r'^\| total \| ([0-9,]+) \|', page, re.M)[1].replace(',', '')
    assert parts['total'] == pytest.approx(int(total), rel=0.02)
