"""The documentation against the code: options, commands, links, names, and every Python block."""

import contextlib
import io
import itertools
import json
import re
import shlex
import urllib.parse
from types import SimpleNamespace

import click
import pytest
import torch
from click.testing import CliRunner
from gaussian import Gaussian
from helpers import ROOT
from losses import Loss, targets
from pages import COMMANDS, PAGES, README, blocks, calls, value_of

import train
from dnnlib import EasyDict
from docs import generate_options
from torch_utils import training_stats
from torch_utils.flat import FlatParameters
from training import command_line, networks
from training import consistency_ops as ops
from training.objectives import OBJECTIVES
from training.phema import WeightAverages
from training.rng import SampleRng
from training.tick_stats import Clock, network_stats, tick_stats
from training.trained import Trained
from training.weight_update import WeightUpdate

# Options of torchrun, srun and docker.
FOREIGN = {
    'rm',
    'ipc',
    'gpus',
    'standalone',
    'nproc_per_node',
    'nnodes',
    'node_rank',
    'rdzv_backend',
    'rdzv_endpoint',
    'rdzv_id',
    'numa-binding',
    'numa_binding',
    'ntasks',
    'ntasks-per-node',
    'kill-on-bad-exit',
    'nodes',
    'gpus-per-node',
    'signal',
    'requeue',
    'signals-to-handle',
    'shutdown-timeout',
    'max-restarts',
}


# ----------------------------------------------------------------------------
# Options.


def test_options_md_is_what_the_declarations_say():
    assert (ROOT / 'docs' / 'options.md').read_text() == generate_options.page(), (
        'run python -m docs.generate_options'
    )


def test_no_page_names_an_option_that_does_not_exist():
    known = (
        FOREIGN
        | {'help', 'x'}
        | {
            name[2:]
            for command in COMMANDS.values()
            for option in generate_options.options_of(command)
            for name in [*option.opts, *option.secondary_opts]
        }
    )
    for page in (*PAGES, README):
        named = set(re.findall(r'(?<![\w:-])--([A-Za-z][\w-]*)', page.read_text()))
        assert named <= known, f'{page.name}: {sorted(named - known)}'


# ----------------------------------------------------------------------------
# Commands.


def shell_commands():
    return [call for page in (README, *PAGES) for call in calls(page)]


def test_every_command_parses_and_its_options_go_together(monkeypatch, tmp_path):
    # The file that search.py --schedule writes.
    (tmp_path / 'levels.txt').write_text('80,1,0.002')
    monkeypatch.chdir(tmp_path)
    # The run of a --resume, which is not there.
    stored = dict(outdir='training-runs', data='data.zip', objective='diffusion')
    monkeypatch.setattr(command_line.stored_options, 'read', lambda *_: stored)
    found = shell_commands()
    assert {call.page for call in found} >= {'README.md', 'recipes.md'}
    assert {name for _, _, name, _ in found} >= {
        'train.py',
        'generate.py',
        'fid.py calc',
        'fid.py ref',
        'validation.py',
        'dataset_tool.py',
    }
    for page, _, name, arguments in found:
        if value_of('--config', arguments):  # its file is made, and read, by test_doc_commands.py
            continue
        try:
            context = COMMANDS[name].make_context(name, list(arguments))
            if name == 'train.py':
                command_line.choose(*command_line.given_and_stored(context))
        except click.UsageError as error:
            pytest.fail(f'{page}: {name} {shlex.join(arguments)}: {error.format_message()}')


def test_torchrun_is_kept_from_reading_num():
    found = [
        (page, before, name)
        for page, before, name, arguments in shell_commands()
        if 'torchrun' in before and any(argument.startswith('--num=') for argument in arguments)
    ]
    assert found
    for page, before, name in found:
        assert before[-1] == '--', f'{page}: {name}'


# ----------------------------------------------------------------------------
# Links and names.


def anchors(path):
    """GitHub's names of a page's headings."""
    headings = re.findall(r'^#+ (.*)$', path.read_text(), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def links(page):
    return re.findall(r'\]\(([^)\s]+)\)', page.read_text())


def is_address(target):
    """A well-formed https address; nothing is opened."""
    parts = urllib.parse.urlsplit(target)
    return (
        parts.scheme == 'https'
        and re.fullmatch(r'[a-z0-9-]+(\.[a-z0-9-]+)+', parts.netloc)
        and re.fullmatch(r'[\w/.~%+=&?#-]*', target.removeprefix(f'https://{parts.netloc}'))
    )


def test_links_lead_to_files_and_headings():
    found = [(page, target) for page in (*PAGES, README) for target in links(page)]
    assert len(found) > 80
    for page, target in found:
        if ':' in target:
            assert is_address(target), f'{page.name}: {target}'
            continue
        path, _, anchor = target.partition('#')
        path = (page.parent / path).resolve() if path else page
        assert path.is_file(), f'{page.name}: {target}'
        assert not anchor or anchor in anchors(path), f'{page.name}: {target}'


def test_the_index_names_every_page():
    index = (ROOT / 'docs' / 'README.md').read_text()
    assert all(f'({page.name})' in index for page in PAGES if page.name != 'README.md')


def test_files_and_functions_that_the_pages_name_exist():
    named = [
        (page.name, path, name)
        for page in PAGES
        for path, name in re.findall(r'`([\w/]+\.py)(?:: (\w+))?`', page.read_text())
    ]
    assert len(named) > 100 and sum(bool(name) for _, _, name in named) > 50
    for page, path, name in named:
        assert (ROOT / path).is_file(), f'{page}: {path}'
        definition = rf'^\s*(?:def|class) {name}\b|^{name}\b.* = '
        assert not name or re.search(definition, (ROOT / path).read_text(), re.M), f'{page}: {path}: {name}'


# ----------------------------------------------------------------------------
# The published implementation, and papers.


@pytest.mark.parametrize('page', [*PAGES, README], ids=lambda page: page.name)
def test_what_is_published_is_linked_where_it_is_named(page):
    """In each section, or for the table of options, at its top. Its FIDs are never given as ours."""
    text = page.read_text()
    sections = [text] if page.name == 'options.md' else re.split(r'^(?=##? )', text, flags=re.M)
    for section in sections:
        title = section.partition('\n')[0]
        if re.search(r'published\s+(student|command|implementation|README|run|script|system)\b', section):
            linked = 'EpiGenomicsCode/edm](https://' in section or '#the-published-implementation' in section
            assert linked or page.name == 'references.md', f'{page.name}: {title}'
        if re.search(r'FID\s+2\.[37]\b', section):
            assert re.search(r'reported\s+by\s+that\s+project,\s+not\s+reproduced\s+here', section), (
                f'{page.name}: {title}'
            )


def test_every_paper_has_a_link_and_its_bibtex():
    text = (ROOT / 'docs' / 'references.md').read_text()
    rows = dict(re.findall(r'^\|.*\]\(https://arxiv\.org/abs/(\d{4}\.\d{5})\).*\| `(\w+)` \|$', text, re.M))
    entries = {
        re.search(r'eprint = \{(.*)\}', entry)[1]: entry.partition('{')[2].partition(',')[0]
        for entry in re.findall(r'^@.*?^\}', text, re.M | re.S)
    }
    assert rows == entries and len(rows) >= 30
    assert all(text.count(f'  {name} = ') == len(entries) for name in ('title', 'author', 'year'))


def test_every_objective_that_a_paper_proposes_has_its_paper():
    """`diffusion` is EDM's training; `direct` is ours, with related work."""
    text = (ROOT / 'docs' / 'references.md').read_text()
    assert all(f'`{name}`' in text for name in OBJECTIVES.keys() - {'diffusion', 'direct'})


# ----------------------------------------------------------------------------
# Python blocks.


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_python_blocks_run_and_print_what_stands_below_them(page):
    for code, expected in blocks(page, 'python'):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page.name, 'exec'), {})
        assert printed.getvalue() == (expected or '')


@pytest.fixture
def worked_example():
    ((code, _),) = blocks(ROOT / 'docs' / 'new-objective.md', 'python')
    namespace = {}
    exec(compile(code, 'new-objective.md', 'exec'), namespace)
    yield SimpleNamespace(**namespace)
    training_stats.reset()


def student():
    torch.manual_seed(0)
    net = networks.EDMPrecond(
        8, 1, 0, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[], dropout=0
    ).double()
    torch.nn.init.normal_(net.model.out_conv.weight, std=0.1)
    return net


SEGMENTS = dict(OBJECTIVES['mct'].options, T_anneal_kimg=0, sigma_data=0.5)


def test_the_worked_example_distils_at_second_order(worked_example):
    """On edges that end a segment the boundary target is the hop itself: twice as many edges divide its error by about eight."""
    gaussian, errors = Gaussian(torch.tensor(0.25)), []
    y, noise = torch.ones(2, 1, 1, 1, 1, dtype=torch.float64)
    for S in (64, 128, 256):
        options = dict(
            SEGMENTS,
            S=S,
            T_start=S,
            T_end=S,
            student_grid='full',
            cd_loss='l2',
            sampling_mode='uniform',
            middle=0.5,
        )
        loss = Loss(worked_example, gaussian, **options)
        x_t, x_star, edges = targets(loss, gaussian, y, noise)
        x_t, x_star, sigma_t, sigma_b = (
            values[S // 2 :][:1] for values in (x_t, x_star, edges.sigma_t, edges.sigma_b)
        )
        x_b = ops.ddim_step(x_t, x_star, sigma_t, sigma_b)
        errors.append(float((x_b / gaussian.solve(x_t, sigma_t, sigma_b) - 1).abs()))
    assert all(6 < a / b < 10 for a, b in itertools.pairwise(errors)), errors


def test_the_worked_example_trains_and_does_not_depend_on_how_the_batch_is_split(worked_example):
    net, teacher = student(), student().eval().requires_grad_(False)
    loss = Loss(worked_example, teacher, **dict(SEGMENTS, S=2, T_start=16, T_end=16, middle=0.5))
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss.begin_step(0)
    whole = loss(net, images, None, SampleRng(3, 128, 64))
    parts = [loss(net, images[a : a + 16], None, SampleRng(3, 128 + a, 16)) for a in range(0, 64, 16)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-9)
    whole.sum().backward()
    assert whole.shape == (64,) and sum(p.grad.abs().sum() for p in net.parameters()) > 0


# ----------------------------------------------------------------------------
# Formats.


def test_formats_md_names_every_entry_of_a_configuration(tmp_path, digits):
    result = CliRunner().invoke(
        train.main, [f'--outdir={tmp_path}', f'--data={digits}', '--cres=1,2', '--dry-run']
    )
    text = (
        (ROOT / 'docs' / 'formats.md')
        .read_text()
        .partition('## `training_options.json`')[2]
        .partition('\n## ')[0]
    )
    assert set(re.findall(r'`(\w+)`', text)) == set(json.loads(result.stdout)) | {'class_name', 'kwargs'}


def test_formats_md_names_every_statistic():
    training_stats.reset()
    teacher = student().eval().requires_grad_(False)
    loss = Loss('mcd', teacher, S=1, T_start=8, T_end=8, T_anneal_kimg=0, cd_loss='l2', cd_weight_mode='flat')
    loss(student(), torch.zeros(64, 1, 8, 8), None, SampleRng(0, 0, 64))
    flat = FlatParameters(student())
    averages = WeightAverages(student(), flat, 1e3, None, [])
    c = EasyDict(lr=1, batch_size=64, total_nimg=64, lr_rampup_nimg=0, lr_schedule='constant', lr_ref_nimg=0)
    run = EasyDict(c=c, averages=averages, device=torch.device('cpu'), start_nimg=0)
    run.progress = EasyDict(tick=0, nimg=64, tick_start_nimg=0)
    ticks = tick_stats(run, Clock(0, 0, 0), 1, 0)
    ticks |= network_stats([Trained(None, None, None, WeightUpdate(flat, (0.9, 0.999), 1e-8))], averages)
    names = {name.replace('EMA/ema_', 'EMA/<average>_') for name in [*training_stats.collect(), *ticks]}
    names = {
        re.sub(r'/sigma_.*', '/sigma_<low>-<high>', re.sub(r'segment\d+', 'segment<j>', name))
        for name in names
    }
    text = (ROOT / 'docs' / 'formats.md').read_text()
    documented = set(re.findall(r'`((?:Loss|Edges|Progress|EMA|Timing|Resources)/[^`]+)`', text))
    losses = {objective.module().NAME for objective in OBJECTIVES.values()} | {'weighted_error'}
    of_others = {
        'Loss/steps<N>',
        'Loss/other_pairs',
        'Edges/stage',
        'Edges/boundary',
        'Edges/first_stage',
        'Progress/grad_norm',
        'Loss/auxiliary',
        *(f'Progress/auxiliary_{name}' for name in ('grad_norm', 'loss_scale', 'bad_steps')),
    }
    assert documented == names | {f'Loss/{name}' for name in losses} | of_others
