"""The benchmarks: what they count is right, and the pages that they write are whole. How fast anything is, is not tested."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import time
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from helpers import ROOT, assert_one_clear_error, run_python

from benchmarks import __main__ as driver
from benchmarks import (
    checkpoint,
    common,
    data,
    derivatives,
    frechet,
    gpu_check,
    images,
    kernels,
    memory,
    pieces,
    precision,
    sampling,
    scaling,
    sharding,
    sizes,
    solvers,
    startup,
    state,
    step,
)
from training.solvers import ODE_SOLVERS

SCRIPTS = {
    'step.py': step,
    'pieces.py': pieces,
    'kernels.py': kernels,
    'memory.py': memory,
    'sampling.py': sampling,
    'solvers.py': solvers,
    'startup.py': startup,
    'data.py': data,
    'checkpoint.py': checkpoint,
    'state.py': state,
    'frechet.py': frechet,
    'derivatives.py': derivatives,
    'gpu_check.py': gpu_check,
    'images.py': images,
    'precision.py': precision,
    'scaling.py': scaling,
    'sharding.py': sharding,
}
CPU = torch.device('cpu')

# ----------------------------------------------------------------------------
# Pages and blocks.


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table of a page, by rows."""
    groups = re.findall(r'(?:^\|.*\|\n?)+', text, re.M)
    return [[line.strip('|').split('|') for line in group.strip('\n').splitlines()] for group in groups]


def commands(text: str) -> list[str]:
    """Calls of benchmarks in the page."""
    return re.findall(r'`((?:OMP_NUM_THREADS=\d+ )?python (?:benchmarks/|-m benchmarks)[^`]*)`', text)


def check_command(words: str) -> None:
    """The script is there and takes these arguments."""
    match = re.fullmatch(r'(?:OMP_NUM_THREADS=\d+ )?python (?:benchmarks/(\w+\.py)|-m benchmarks)(.*)', words)
    main = SCRIPTS[match[1]].main if match[1] else driver.main
    try:
        main.make_context(words, shlex.split(match[2]))
    except click.UsageError as error:
        pytest.fail(f'{words}: {error.format_message()}')


def check_block(text: str) -> list[list[list[str]]]:
    """A heading, the command, prose, the machine, then tables with columns of equal number and nothing empty; returns the tables."""
    heading, command, prose, device, *_ = text.split('\n\n')
    assert (
        re.fullmatch(r'## \S.*', heading)
        and commands(command) == [command.strip('`')]
        and device.startswith('    ')
        and 'torch' in device
    )
    check_command(command.strip('`'))
    assert 'nan' not in text.split() and all(len(line) <= common.WIDTH for line in prose.splitlines())
    found = tables(text)
    assert found
    for header, rule, *rows in found:
        assert rows and {len(row) for row in (header, rule, *rows)} == {len(header)}
        assert all(re.fullmatch(r' :?--:? ', cell) for cell in rule)
        assert all(row[0].strip() for row in rows)
    return found


def invoke(monkeypatch, script: str, *arguments: str) -> str:
    """What a script prints, in this process."""
    monkeypatch.setattr('sys.argv', [f'benchmarks/{script}', *arguments])
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(SCRIPTS[script].main, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout.strip('\n')


def column(table: list[list[str]], name: str) -> dict[str, str]:
    """{first cell: cell under the heading}"""
    header, _, *rows = [[cell.strip() for cell in row] for row in table]
    return {row[0]: row[header.index(name)] for row in rows}


# ----------------------------------------------------------------------------
# What is counted.


def test_operations_are_those_counted_by_hand():
    """3x3 from 3 to 8 channels, then 1x1 from 8 to 4, on 16x16: 2 a product. Back, each asks for the gradient of its weights, as many again, and the
    second for that of its input too; the image needs none."""
    with torch.device('meta'):
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 4, 1)
        )
        found = sizes.count_operations(net, torch.zeros(1, 3, 16, 16))
    first, second = 2 * 256 * 9 * 3 * 8, 2 * 256 * 8 * 4
    assert found == sizes.Operations(
        parameters=9 * 3 * 8 + 8 + 8 * 4 + 4, forward=first + second, backward=first + 2 * second
    )
    assert found.of_step(plain=5, differentiated=2) == 5 * found.forward + 2 * (
        found.forward + found.backward
    )


def test_operations_of_a_network_are_those_of_its_layers():
    """The demo's with heads of 16 channels, so that one block has attention: by hooks on convolutions and linear layers; the two products of
    attention, 2 L² C each; and means over 2x2 pixels on the way down, copies to as many on the way up, in two branches each, channel by channel."""
    demo, counted = sizes.SIZES['demo'], []
    size = dataclasses.replace(demo, network=dict(demo.network, channels_per_head=16))

    def hook(module, inputs, output):
        if hasattr(module, 'weight') and module.weight is not None and module.weight.ndim in (2, 4):
            positions = output.shape[2:].numel() if module.weight.ndim == 4 else 1
            counted.append(2 * module.weight.numel() * positions)

    net = size.build().eval()
    for module in net.modules():
        if type(module).__name__ in ('Conv2d', 'Linear'):
            module.register_forward_hook(hook)
    net(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1, 10))
    positions = 4 * 4
    attention = 2 * (2 * positions**2 * 32)
    resampling = 2 * (2 * 4 * 16 * positions) + 2 * (2 * 4 * 32 * positions)
    assert sizes.operations(size).forward == sum(counted) + attention + resampling


@pytest.fixture(autouse=True)
def compiler_as_before():
    """`step.Training.use` tells the compiler for the whole process what may run compiled."""
    yield
    torch.compiler.set_stance('default')


def test_a_step_asks_the_networks_what_the_objective_says():
    """Of 8 images with T = 1280: the teacher twice and the student once without gradients, and the teacher's
    solution on edges from sigma_max; the student once with them."""
    training = step.Training('demo', 8, CPU)
    training.use(step.Way())
    row = training.step(0, inside=True)
    assert row['differentiated_images'] == 8 and row['plain_images'] >= 3 * 8
    assert len(training.loss_state.edges) >= 1280
    assert sum(row[part] for part in step.PARTS[:-1]) == pytest.approx(row['total'])
    assert min(row[part] for part in step.PARTS) > 0
    assert step.total(row) == row['total'] and step.total(dict(row, whole=1.5)) == 1.5


def test_ways_of_running_are_set_and_taken_back():
    training = step.Training('demo', 2, CPU)
    training.use(step.Way(precision='bf16', channels_last=True, checkpoint_activations=True))
    held = training.loss_state.teacher
    assert (
        training.student.use_bf16
        and held.use_bf16
        and held.channels_last
        and training.student.model.checkpoint_activations
    )
    assert (
        held.model.out_conv.weight.dtype == torch.bfloat16
        and training.teacher.model.out_conv.weight.dtype == torch.float32
    )
    training.step(0, inside=False)
    training.use(step.Way())
    plain = training.loss_state.teacher
    assert not (
        training.student.use_bf16
        or training.student.channels_last
        or training.student.model.checkpoint_activations
        or plain.use_bf16
    )
    assert plain.model.out_conv.weight.dtype == torch.float32


@pytest.mark.parametrize(
    'name, precision, tf32, expected',
    [
        ('NVIDIA A100-SXM4-80GB', 'fp32', True, 156e12),
        ('NVIDIA H100 80GB HBM3', 'fp16', False, 989.4e12),
        ('NVIDIA H200', 'fp32', False, 67e12),
        ('NVIDIA H100 PCIe', 'fp16', False, None),
        ('NVIDIA H200 NVL', 'bf16', False, None),
    ],
)
def test_peaks_are_of_cards_that_are_known_by_their_whole_names(monkeypatch, name, precision, tf32, expected):
    """Cards of nearly the same name are slower: no figure is better than a wrong one."""
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    found = step.peak.__wrapped__(torch.device('cuda'), precision, tf32)
    assert found == expected
    assert step.share_of_peak(
        [dict(total=1.0, plain_images=3, differentiated_images=1)], sizes.Operations(1, 1e12, 2e12), found
    ) == ('n/a' if found is None else f'{6e12 / expected:.1%}')


def test_memory_counts_every_vector_of_the_run_and_less_of_it_where_an_option_saves_some():
    """The demo's network keeps an EMA alone: 4 bytes a parameter each, and Adam's moments 8."""
    found = {name: memory.parts_of('demo', name, 64) for name in memory.WAYS}
    plain, vector = found['plain'], 4 * sum(p.numel() for p in sizes.SIZES['demo'].build().parameters())
    assert [plain[part] for part in ('teacher', 'weights', 'gradients', 'averages')] == 4 * [vector]
    assert (plain['optimizer'], plain['rounded']) == (2 * vector, 0)
    assert found['--checkpoint-activations']['activations'] < plain['activations'] / 2
    half = found['--precision=bf16']
    assert vector / 2 < half['teacher'] < vector * 0.75  # linear layers stay
    assert half['rounded'] == vector and half['activations'] < 0.6 * plain['activations']
    assert found['--ema-device=cpu'] == plain | dict(averages=0)
    least = {name: sum(parts.values()) for name, parts in found.items()}
    assert min(least, key=least.get) == 'all three'
    doubled = memory.parts_of('demo', 'plain', 128)
    assert doubled['activations'] / plain['activations'] == pytest.approx(2, rel=1e-4)


# ----------------------------------------------------------------------------
# What is written.


@pytest.mark.slow
def test_the_step_writes_its_parts_and_a_row_for_every_way(monkeypatch):
    text = invoke(monkeypatch, 'step.py', '--steps=1', '--batch=2', '--ways=channels_last')
    parts, ways = check_block(text)
    assert list(column(parts, 'share')) == list(step.PARTS) and column(parts, 'share')['total'] == '100.0%'
    assert column(ways, 'times faster, median')['plain'] == '1.000' and list(column(ways, 'least')) == [
        'plain',
        '--channels_last',
    ]


def test_what_a_machine_cannot_measure_stands_in_the_table():
    measured = dict(
        first=1.0,
        steps=[dict.fromkeys(step.PARTS, 0.5) | dict(total=2.0, plain_images=6, differentiated_images=2)],
    )
    table = tables(
        step.ways_table(
            {'plain': {'plain': measured}}, list(step.WAYS), 2, sizes.Operations(1, 1.0, 2.0), {'plain': 12.0}
        )
    )[0]
    assert [row[0].strip() for row in table[2:]] == list(step.OPTIONS.values())
    assert [cell.strip() for cell in table[2][1:]] == [
        '1.0 s',
        '2000.00 ms',
        '2000.00 ms',
        '1',
        '1.000',
        '1.000',
        '50.0%',
    ]  # 12 operations in 2 s
    assert {cell.strip() for row in table[3:] for cell in row[1:]} == {common.NOT_MEASURED}


def test_large_networks_are_not_compiled_on_a_cpu_unless_asked():
    assert step.ways_for('cifar10-ddpmpp', CPU, False) == ['plain', 'channels_last', 'checkpoint', 'bf16']
    assert step.ways_for('cifar10-ddpmpp', CPU, True) == [
        'plain',
        'channels_last',
        'compile',
        'checkpoint',
        'bf16',
        'fast',
    ]
    assert step.ways_for('imagenet64-adm', CPU, False) == ['plain', 'channels_last', 'bf16']
    assert step.ways_for('imagenet64-adm', torch.device('cuda'), False) == list(step.WAYS)


def test_ways_that_do_not_exist_or_need_a_gpu_are_usage_errors(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for arguments, words in ((['--ways=warp'], 'channels_last'), (['--ways=fp16'], 'GPU')):
        assert_one_clear_error(CliRunner().invoke(step.main, arguments), words, status=2)


@pytest.mark.parametrize(
    'script, arguments',
    [
        ('memory.py', ['--size=demo']),
        ('frechet.py', ['--dim=16', '--rounds=1']),
        ('derivatives.py', ['--sizes=demo', '--rounds=1']),
        ('pieces.py', ['--size=demo', '--rounds=1']),
    ],
)
def test_scripts_write_a_block(monkeypatch, script, arguments):
    # Of memory.py one way, because each is counted in a process of its own.
    monkeypatch.setattr(memory, 'WAYS', {'plain': memory.WAYS['plain']})
    check_block(invoke(monkeypatch, script, *arguments))


@pytest.mark.parametrize(
    'name, size, tolerance',
    [('attention', 'cifar10-ddpmpp', 1e-5), ('Adam', 'demo', 1e-6), ('averages: EMA and 2 phEMA', 'demo', 0)],
)
def test_what_has_no_switch_gives_the_numbers_of_the_plain_way(name, size, tolerance):
    """FP32 sums in another order, to so much of the largest number; after a second call too, for which moments and averages have changed."""
    torch.manual_seed(0)
    plain, ours = pieces.PIECES[name](size, CPU)
    for _ in range(2):
        expected = [value.detach().clone() for value in plain()]
        assert pieces.difference(expected, ours()) <= tolerance
    assert pieces.difference(expected, [value + 1 for value in expected]) > 0.01
    assert len(pieces.PIECES) == 3


@pytest.mark.slow
def test_sampling_writes_every_image_in_every_way(monkeypatch):
    (table,) = check_block(
        invoke(monkeypatch, 'sampling.py', '--images=5', '--batch=2', '--rounds=1', '--workers=0', '--eager')
    )
    rates = column(table, 'images/s')
    assert list(rates) == [
        sampling.ALONE,
        sampling.WRITING,
        sampling.PLAIN,
        sampling.OVERLAPPED,
        *sampling.FASTER,
        *sampling.SHARED,
    ]
    compiled = [rates.pop(name) for name in list(rates) if 'compile' in name]
    assert compiled == [common.NOT_MEASURED] * 3 and all(float(rate) > 0 for rate in rates.values())


def test_start_up_knows_the_scripts_and_what_training_says(monkeypatch, tmp_path):
    """`train.py` itself is run by the test of the whole page."""
    assert {'train.py', 'generate.py', 'fid.py', 'demo.py'} <= set(
        startup.scripts()
    ) and 'example.py' not in startup.scripts()
    (tmp_path / 'train.py').write_text(
        "print('Data: 9 images'); print('Training for 1 kimg...'); print('tick 0     kimg 1')"
    )
    monkeypatch.setattr(startup, 'ROOT', tmp_path)
    seconds = startup.time_training()
    assert (
        list(seconds) == list(startup.EVENTS)
        and 0 < seconds['data ready'] <= seconds['training begins'] <= seconds['first step done']
    )
    (tmp_path / 'train.py').write_text("print('Data: 9 images')")
    with pytest.raises(RuntimeError, match='data ready'):
        startup.time_training()


def test_rows_that_are_not_as_long_as_their_heading_are_errors():
    with pytest.raises(ValueError, match=r'\[3\] cells'):
        common.table(['a', 'b'], [['1', '2', '3']])


# ----------------------------------------------------------------------------
# The page.


def test_some_blocks_are_measured_again_and_the_others_stay(tmp_path, monkeypatch):
    page = tmp_path / 'page.md'
    printed = iter(['## One\n\nfirst', '## Two\n\nsecond', '## One\n\nagain'])
    monkeypatch.setattr(driver, 'measure', lambda benchmark, quick: next(printed))
    invoke_driver = lambda *arguments: CliRunner().invoke(driver.main, [f'--out={page}', *arguments])
    assert invoke_driver('--only=frechet,step-demo').exit_code == 0
    assert driver.read_blocks(page) == {'step-demo': '## Two\n\nsecond', 'frechet': '## One\n\nfirst'}
    assert page.read_text().index('second') < page.read_text().index(
        'first'
    )  # the order of the page, not of the command line
    assert invoke_driver('--only=frechet').exit_code == 0
    assert driver.read_blocks(page) == {'step-demo': '## Two\n\nsecond', 'frechet': '## One\n\nagain'}
    missing = ','.join(name for name in driver.BENCHMARKS if name not in ('frechet', 'step-demo'))
    assert f'Not measured: `python -m benchmarks --only={missing}`.' in page.read_text()
    check_command(f'python -m benchmarks --only={missing}')


def test_a_benchmark_that_fails_leaves_the_old_block_and_is_named(tmp_path, monkeypatch):
    page = tmp_path / 'page.md'
    driver.write_page(page, {'frechet': 'old', 'state': 'old'}, {})
    monkeypatch.setattr(
        driver, 'measure', lambda benchmark, quick: None if benchmark.script == 'frechet.py' else 'new'
    )
    assert_one_clear_error(
        CliRunner().invoke(driver.main, [f'--out={page}', '--only=frechet,state']), 'frechet failed'
    )
    assert driver.read_blocks(page) == {'state': 'new', 'frechet': 'old'}


def test_a_script_that_ends_with_an_error_has_no_block():
    assert driver.measure(driver.Benchmark('frechet.py', ['--dim=1']), quick=False) is None


@pytest.mark.parametrize(
    'arguments, words, status',
    [
        (['--only=step-demo,warp'], 'warp', 2),
        (['--only=frechet', '--out={tmp}/other.md'], 'leave out --only', 1),
        (['--only=frechet', '--out={tmp}/nowhere/page.md'], 'not a folder', 1),
    ],
)
def test_the_driver_refuses_what_it_cannot_do_before_it_measures(
    tmp_path, monkeypatch, arguments, words, status
):
    (tmp_path / 'other.md').write_text('# Another page\n')
    monkeypatch.setattr(driver, 'measure', lambda *_: pytest.fail('measured'))
    assert_one_clear_error(
        CliRunner().invoke(driver.main, [word.format(tmp=tmp_path) for word in arguments]),
        words,
        status=status,
    )
    assert (tmp_path / 'other.md').read_text() == '# Another page\n'


def check_page(path: Path) -> dict[str, str]:
    """Every block is whole, and every command can be given; returns the blocks."""
    for words in commands(path.read_text()):
        check_command(words)
    blocks = driver.read_blocks(path)
    for block in blocks.values():
        check_block(block)
    return blocks


def test_the_results_page_is_whole_and_its_commands_are_those_of_the_driver():
    page = ROOT / 'benchmarks' / 'RESULTS.md'
    blocks = check_page(page)
    assert set(blocks) == set(driver.BENCHMARKS)
    # The record beside it is the same, with commands and commits.
    commits = driver.read_commits(page)
    assert json.loads(page.with_suffix('.json').read_text()) == driver.record_of(blocks, commits)
    assert all(re.fullmatch('[0-9a-f]{12}(-dirty)?', commit) for commit in commits.values())
    for name, block in blocks.items():
        benchmark = driver.BENCHMARKS[name]
        threads = [f'OMP_NUM_THREADS={benchmark.threads}'] if benchmark.threads else []
        assert commands(block)[0] == shlex.join(
            [*threads, 'python', f'benchmarks/{benchmark.script}', *benchmark.arguments]
        ), name


@pytest.mark.parametrize('arguments', [[], ['--outer=12.5']])
def test_the_page_on_scaling_has_what_the_script_prints(monkeypatch, arguments):
    printed = invoke(monkeypatch, 'scaling.py', *arguments)
    page = (ROOT / 'docs' / 'scaling.md').read_text()
    assert all(f'    {line}\n' in page for line in printed.splitlines() if line.strip()), printed


def test_the_driver_runs_a_benchmark_in_a_process_of_its_own(tmp_path):
    page = tmp_path / 'page.md'
    run_python('-m', 'benchmarks', '--quick', f'--out={page}', '--only=frechet')
    text = check_page(page)['frechet']
    (measured,) = json.loads(page.with_suffix('.json').read_text()).values()
    assert measured['text'] == text and measured['command'] == commands(text)[0]
    assert commands(text) == ['OMP_NUM_THREADS=1 python benchmarks/frechet.py --dim=16 --rounds=1']


@pytest.mark.slow
def test_everything_can_be_measured_quickly(tmp_path):
    page = tmp_path / 'page.md'
    run_python('-m', 'benchmarks', '--quick', f'--out={page}', timeout=1500)
    assert check_page(page).keys() == driver.BENCHMARKS.keys()


@pytest.mark.slow
def test_compiled_networks_are_measured_in_turns_with_plain_ones():
    done = json.loads(
        run_python(
            'benchmarks/step.py', '--steps=2', '--batch=4', '--ways=fast', '--json', timeout=1500
        ).stdout
    )
    fast, plain = done['ways']['fast']['fast'], done['ways']['fast']['plain']
    assert len(fast['steps']) == len(plain['steps']) == 2
    assert [row['differentiated_images'] for row in fast['steps']] == [4, 4] and fast['first'] > plain[
        'first'
    ]


# ----------------------------------------------------------------------------
# The checks for a GPU, tried on the CPU.

IN_PROCESS = gpu_check.CHECKS[:6]


def test_the_checks_for_a_gpu_pass_on_the_cpu_where_they_can(tmp_path):
    """Those that start no process."""
    names = ','.join(check.__name__ for check in IN_PROCESS)
    done = CliRunner().invoke(
        gpu_check.main, ['--device=cpu', f'--outdir={tmp_path / "out"}', f'--only={names}']
    )
    assert done.exit_code == 0, done.output
    report = (tmp_path / 'out' / 'report.txt').read_text().splitlines()
    assert [line.split()[0] for line in report[1:]] == ['ok'] * len(IN_PROCESS)
    assert done.stdout.splitlines() == report


def test_a_check_that_fails_or_has_no_time_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    def fails(s):
        s.facts.append('1.5 of 2')
        raise RuntimeError('broken')

    def is_slow(s):
        raise gpu_check.Slow('aims: 2')

    def is_late(s):
        s.deadline = 0

    checks = dict(fails=fails, is_slow=is_slow, is_late=is_late, comes_last=is_slow)
    monkeypatch.setattr(gpu_check, 'BY_NAME', {})
    gpu_check.BY_NAME.update(checks)
    for check_name, check in checks.items():
        monkeypatch.setattr(check, '__name__', check_name)
    done = CliRunner().invoke(gpu_check.main, ['--device=cpu', f'--outdir={tmp_path / "out"}'])
    lines = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert lines == ['FAILED', 'slow', 'ok', 'skipped'] and done.exit_code == 1
    assert 'fails (0 s): 1.5 of 2; RuntimeError broken' in done.stdout
    assert 'broken' in (tmp_path / 'out' / 'fails.error.txt').read_text()
    assert '2 of 4 checks failed or were skipped' in done.stderr


def test_a_command_of_a_check_that_fails_names_its_file(tmp_path):
    session = gpu_check.Session(CPU, tmp_path, time.monotonic() + 60)
    with pytest.raises(RuntimeError, match='exit status 3'):
        session.command('name', '-c', 'import sys; print("why", file=sys.stderr); sys.exit(3)')
    assert 'why' in (tmp_path / 'name.txt').read_text()
    assert session.command('other', '-c', 'print(5)') == '5\n'


def test_the_checks_for_a_gpu_refuse_to_run_without_one_or_into_an_old_folder(tmp_path):
    assert_one_clear_error(
        CliRunner().invoke(gpu_check.main, [f'--outdir={tmp_path / "new"}']), '--device=cpu'
    )
    assert_one_clear_error(
        CliRunner().invoke(gpu_check.main, ['--device=cpu', f'--outdir={tmp_path}']), 'choose another folder'
    )
    listed = CliRunner().invoke(gpu_check.main, ['--list']).output.split()
    assert listed == [check.__name__ for check in gpu_check.CHECKS]


def test_solvers_are_measured_against_the_network():
    network, outside = solvers.measured('demo', batch=2, rounds=1)
    assert network > 0 and outside.keys() == ODE_SOLVERS.keys() and min(outside.values()) > 0
