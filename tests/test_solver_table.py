"""`python -m experiments.solver_table`: what a teacher does by every solver."""

import json

import numpy as np
import pytest
import torch
from helpers import assert_one_clear_error, invoke

import fid
from experiments import solver_table
from metrics import generated, pairs
from metrics.generated import GeneratedImages
from training import networks
from training.checkpoint import save_snapshot


class Grays(torch.nn.Module):
    """Gray levels of three pixels."""

    def forward(self, images):
        return images[:, 0, 1, 1:4].float() / 255


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    """A folder with teacher.pkl, student.pkl, grays.pt and ref.npz."""
    folder = tmp_path_factory.mktemp('table')
    torch.manual_seed(0)
    net = networks.EDMPrecond(
        8, 1, 0, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], dropout=0
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_snapshot(folder / 'teacher.pkl', net, objective='diffusion')
    save_snapshot(folder / 'student.pkl', net, objective='mcd', S=2, sigmas=[80.0, 1.0, 0.0])
    torch.jit.script(Grays()).save(folder / 'grays.pt')
    np.save(folder / 'data.npy', np.random.default_rng(0).integers(90, 180, (50, 8, 8), dtype=np.uint8))
    detector = f'--detector={folder}/grays.pt'
    made = invoke(fid.main, 'ref', f'--data={folder}/data.npy', f'--dest={folder}/ref.npz', detector)
    assert made.exit_code == 0, made.output
    return folder


def run(lab, path, *more, network='teacher.pkl'):
    return invoke(
        solver_table.main,
        f'--network={lab}/{network}',
        f'--ref={lab}/ref.npz',
        f'--detector={lab}/grays.pt',
        '--num=12',
        '--batch=5',
        '--nfe=2,3',
        f'--json={path}',
        *more,
    )


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch):
    """The good images are made with 8 steps in place of 256."""
    monkeypatch.setattr(pairs, 'GOOD_STEPS', 8)


def test_every_cell_is_what_fid_py_measures(lab, tmp_path):
    """Own levels and cosine's; dpm2 takes one evaluation less than 3, and is nothing with one step."""
    result = run(lab, tmp_path / 'table.json', '--levels=own,cosine')
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / 'table.json').read_text())
    values, errors = record['values'], record['paired_errors']
    names = ('euler', 'ipndm', 'ipndm_v', 'deis', 'dpmpp', 'unipc')
    assert list(values) == [
        f'{levels} {name}'
        for levels in ('own', 'cosine')
        for name in (
            *(f'{name} 2' for name in names),
            'euler 3',
            'heun 3',
            *(f'{name} 3' for name in names[1:]),
        )
    ]
    for key, options in {
        'own dpmpp 3': ['--solver=dpmpp', '--steps=3'],
        'own heun 3': ['--solver=heun', '--steps=2'],
        'cosine ipndm 2': ['--solver=ipndm', '--steps=2', '--disc=cosine'],
    }.items():
        told = invoke(
            fid.main, 'calc', f'--network={lab}/teacher.pkl', '--seeds=0-11', '--batch=5',
            f'--ref={lab}/ref.npz', f'--detector={lab}/grays.pt', *options, f'--pairs-with={lab}/teacher.pkl',
            f'--json={tmp_path}/fid.json',
        )  # fmt: skip
        assert float(told.stdout) == pytest.approx(values[key], rel=1e-9), key
        found = json.loads((tmp_path / 'fid.json').read_text())['paired_error']
        assert found['value'] == pytest.approx(errors[key], rel=1e-9), key
    assert list(errors) == list(values)

    # Two tables, each of which marks the least of a column.
    tables = result.stdout.split('Paired error:')
    for text, found in zip(tables, (values, errors), strict=True):
        lines = [line.split('|')[1:-1] for line in text.strip().splitlines()]
        assert [word.strip() for word in lines[0]] == ['levels', 'solver', '2', '3'] and len(
            lines
        ) == 2 + 2 * 8
        for column, nfe in ((2, 2), (3, 3)):
            least = min(value for key, value in found.items() if key.endswith(f' {nfe}'))
            bold = [line[column].strip() for line in lines if '**' in line[column]]
            assert set(bold) == {f'**{least:.3f}**'}


def test_a_table_that_was_stopped_goes_on_from_what_it_has(lab, tmp_path, monkeypatch):
    path = tmp_path / 'table.json'
    assert run(lab, path, '--levels=own').exit_code == 0
    record = json.loads(path.read_text())
    del record['values']['own unipc 3']
    # A table of an older version has no paired errors.
    errors = record.pop('paired_errors')
    path.write_text(json.dumps(record | dict(values=record['values'] | {'own euler 2': 77.0})))
    result = run(lab, path, '--levels=own')
    assert (
        result.exit_code == 0
        and 'own unipc 3: ' in result.stderr
        and 'own euler 2: 77, paired' in result.stderr
    )
    record = json.loads(path.read_text())
    assert (
        '77.000' in result.stdout
        and record['values'].keys() == record['paired_errors'].keys() == errors.keys()
    )
    again = run(lab, path, '--levels=own')
    assert again.exit_code == 0 and 'own' not in again.stderr
    assert_one_clear_error(
        run(lab, path, '--seed=1'), 'the table of another network, reference, or other images'
    )
    path.write_text('{}')
    assert_one_clear_error(run(lab, path), 'is not a table of solvers')


def test_balanced_labels_are_those_of_all_cells(lab, tmp_path, monkeypatch):
    net = networks.EDMPrecond(8, 1, 3, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    save_snapshot(lab / 'classes.pkl', net, objective='diffusion')
    strata = []

    class Images(GeneratedImages):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            strata.append(self.strata)

    monkeypatch.setattr(generated, 'GeneratedImages', Images)
    table, options = tmp_path / 'table.json', ['--levels=own', '--nfe=2']
    done = run(lab, table, *options, '--labels=balanced', network='classes.pkl')
    assert done.exit_code == 0, done.output
    assert set(strata) == {3} and json.loads(table.read_text())['settings']['labels'] == 'balanced-0-2'
    # Another way to choose labels makes another table.
    assert_one_clear_error(run(lab, table, *options, network='classes.pkl'), 'or other images or labels')


def test_searched_levels_are_those_of_a_search(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(solver_table, 'SEARCH', dict(num=6, nodes=7, low=None, high=None))
    monkeypatch.setattr(solver_table, 'SOLVERS', ('euler', 'ipndm'))
    result = run(lab, tmp_path / 'table.json', '--levels=searched', '--nfe=3')
    assert result.exit_code == 0, result.output
    assert list(json.loads((tmp_path / 'table.json').read_text())['values']) == [
        'searched euler 3',
        'searched ipndm 3',
    ]


def test_what_has_no_solvers_is_refused(lab, tmp_path):
    result = run(lab, tmp_path / 'table.json', network='student.pkl')
    assert_one_clear_error(result, 'is a student or a consistency model')
    assert_one_clear_error(
        run(lab, tmp_path / 'a.json', '--levels=own,other'), "'other' is none of", status=2
    )
