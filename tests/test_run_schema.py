"""The door of a run's files: states, metadata of snapshots, options and statistics hold what they may, or one error says what they do not."""

import copy
import json

import pytest
import torch
from helpers import FAST, TINY_NETWORK, assert_one_clear_error, run
from hypothesis import given
from hypothesis import strategies as st

from dnnlib import UserError
from dnnlib.schema import (
    Dict,
    Integer,
    ListOf,
    Maybe,
    Mismatch,
    OneOf,
    Plain,
    Real,
    Record,
    Row,
    Text,
    check,
    parse_json,
)
from training import checkpoint, run_log, run_schema
from training.checkpoint import load_network, read_state, save_snapshot, save_state
from training.command_line import RUN
from training.objectives import OBJECTIVES
from training.recorded import RECORDED
from training.rounds import recorded_options
from training.run_files import saved_states
from training.run_log import forget_future

DEEP = []
for _ in range(200_000):
    DEEP = [DEEP]
NAN, INF = float('nan'), float('inf')

# ----------------------------------------------------------------------------
# Kinds.


@pytest.mark.parametrize(
    'kind, good, bad',
    [
        (Integer(0, 9), [0, 9], [-1, 10, 1.0, True, '1', None, 10**400]),
        (Real(0, 1), [0, 1, 0.5], [NAN, INF, -1e-9, True, '0', None, 10**400]),
        (Real(0, INF), [INF], [NAN, -INF]),
        (Text('a+'), ['a', 'aa'], ['', 'b', 'a\n', 1, 'a' * 5000]),
        (OneOf(('a', 'b')), ['a'], ['c', None, ['a']]),
        (Maybe(Integer()), [None, 1], ['x']),
        (ListOf(Integer(), 2, 1), [[1], (1, 2)], [[], [1, 2, 3], ['x'], {0: 1}, 'ab']),
        (Row((Integer(), Text())), [[1, 'a']], [[1], ['a', 1], [1, 'a', 2]]),
        (Dict(Text('[a-z]'), Integer()), [{}, {'a': 1}], [{'A': 1}, {1: 1}, {'a': 'x'}, [1]]),
        (
            Record(dict(a=Integer()), ['a']),
            [{'a': 1}, {'a': 1, 'b': [1]}],
            [{}, {'a': 'x'}, {'a': 1, 'b': NAN}, {'a': 1, 2: 3}, None],
        ),
        (Record(dict(a=Integer()), others=None), [{}, {'a': 1}], [{'b': 1}]),
        (
            Plain(),
            [None, {'a': [1, 2.5, 'x', True, (None,)]}],
            [NAN, {1: 2}, {'a': INF}, 10**400, DEEP, b'x', {'a': torch.ones(1)}],
        ),
    ],
)
def test_kinds_take_what_they_say_and_refuse_the_rest(kind, good, bad):
    for value in good:
        assert check(value, kind, 'it') is value
    for value in bad:
        with pytest.raises(Mismatch):
            check(value, kind, 'it')


def test_values_that_share_parts_without_end_take_no_time():
    many = [1]
    for _ in range(31):
        many = [many, many]
    with pytest.raises(Mismatch, match='without end'):
        check(many, Plain(), 'it')


@pytest.mark.parametrize(
    'text', ['[' * 200_000, '1' * 5000, '{"a": 1', '', '\udc80', 'nul', '[1]' + ' ' * 2000]
)
def test_text_that_is_no_json_or_longer_than_it_may_be_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text, 100_000 if len(text) < 1000 or len(text) > 3000 else 1000, 'a test')


# ----------------------------------------------------------------------------
# Training states.


@pytest.fixture(scope='module')
def folder(digits, tmp_path_factory):
    """A finished run with states."""
    folder = tmp_path_factory.mktemp('run') / 'run'
    run(
        'train.py',
        f'--outdir={folder}',
        f'--data={digits}',
        '--cond=1',
        *TINY_NETWORK,
        *FAST,
        '--batch=64',
        '--duration=0.000128',
        '--tick=0.064',
        '--dump=1',
        '--augment=0',
        '--phema=0.1',
        '--max-images=128',
    )
    return folder


@pytest.fixture(scope='module')
def state(folder):
    return checkpoint.load_state(saved_states(folder)[0])


def put(*path_and_value):
    """A change of a copy of the state at a path; `options` is decoded on the way."""
    *path, last, value = path_and_value

    def change(state):
        decoded = path[:1] == ['options']
        if decoded:
            state['options'] = json.loads(state['options'])
        target = state
        for name in path:
            target = target[name]
        if value is put:
            del target[last]
        else:
            target[last] = value
        if decoded:
            state['options'] = json.dumps(state['options'])

    return change


HOSTILE = [
    *(
        put('progress', 'states', {name: None})
        for name in (
            '../victim',
            '/tmp/victim',
            'training-state-000001/../../x',
            'x',
            '',
            '..',
            'training-state-1',
            7,
        )
    ),
    *(put('progress', 'names', {name: 1}) for name in ('../victim', 'x\ny')),
    *(put('progress', 'nimg', value) for value in ('x', -64, None, 10**400, 1.5, NAN, True, [])),
    *(
        put('progress', name, value)
        for name, value in (
            ('states', None),
            ('names', None),
            ('states', []),
            ('tick', -1),
            ('due', 'no'),
            ('fid', NAN),
            ('wandb_id', '../x'),
            ('wandb_id', 7),
            ('tick_start_nimg', '0'),
        )
    ),
    *(
        put(name, put)
        for name in ('net', 'update', 'averages', 'loss', 'progress', 'stats', 'rng', 'options')
    ),
    *(
        put(name, value)
        for name in ('net', 'update', 'averages', 'loss', 'progress', 'stats', 'rng', 'options')
        for value in (None, 7, 'x', [7])
    ),
    *(
        put('options', text)
        for text in ('[]', '7', 'null', '{', '{}', '[' * 200_000, '{"a": ' * 200_000, '1' * 5000, 'NaN')
    ),
    *(
        put('options', name, put)
        for name in ('network', 'loss', 'dataset', 'objective', 'batch_size', 'betas', 'seed', 'total_nimg')
    ),
    *(
        put('options', name, value)
        for name, value in (
            ('network', []),
            ('loss', None),
            ('dataset', 'x'),
            ('objective', 7),
            ('batch_size', 0),
            ('batch_size', 'x'),
            ('betas', [0.9]),
            ('betas', 'ab'),
            ('seed', -1),
            ('seed', NAN),
            ('total_nimg', 10**400),
            ('lr', INF),
            ('phema_stds', [[1]]),
            ('stages', [[1]]),
            ('ema_halflife_nimg', NAN),
            ('resume', 7),
        )
    ),
    *(
        put('options', 'loss', name, value)
        for name, value in (
            ('S', 10**9),
            ('S', 0),
            ('S', '8'),
            ('rho', 0),
            ('rho', NAN),
            ('sigma_min', -1),
            ('sigma_max', 1e308),
            ('sigma_data', 0),
            ('sigma_data', NAN),
            ('T_end', 10**12),
            ('student_grid', 'x'),
            ('student_grid', 7),
            ('P_std', 0),
            ('whatever', INF),
            ('whatever', {'a': NAN}),
        )
    ),
    put('options', 'network', 'kwargs', []),
    put('options', 'network', 'class_name', 7),
    put('options', 'dataset', 'image_shape', [1]),
    *(put('update', 'optimizer', 'state', 0, name, put) for name in ('step', 'exp_avg', 'exp_avg_sq')),
    *(
        put('update', 'optimizer', 'state', 0, name, torch.tensor(value))
        for name, value in (
            ('step', NAN),
            ('step', -5.0),
            ('exp_avg', NAN),
            ('exp_avg', INF),
            ('exp_avg_sq', -1.0),
            ('exp_avg_sq', NAN),
        )
    ),
    *(
        put(*path, torch.full([3, 3], value))
        for path in (['net', 'x'], ['averages', 'ema', 'x'], ['averages', 'phema', 0.1, 'x'])
        for value in (NAN, INF)
    ),
    put('update', 'bad_in_a_row', torch.tensor(-(10**9))),
    put('update', 'scale', torch.tensor(0.0)),
    put('progress', 'tick_start_nimg', 10**15),
    *(
        put('options', name, value)
        for name, value in (
            ('lr_schedule', 'x'),
            ('lr_schedule', 'sqrt'),
            ('optim', 'x'),
            ('precision', 'x'),
            ('lr', 1e300),
            ('lr', 0),
            *(
                (name, None)
                for name in ('lr', 'optim', 'lr_schedule', 'augment', 'precision', 'phema_snapshot_ticks')
            ),
        )
    ),
    *(
        put('options', 'loss', name, None)
        # (S may be None: that of scd without segments. Another objective's run does not resume with it.)
        for name in ('T_start', 'T_anneal_kimg', 'schedule_nimg', 'stage_nimg', 'P_mean', 'sigma_data')
    ),
    put('options', 'loss', 'batch_size', 0),
    *(
        put('options', 'loss', name, 'x')
        for name in ('cd_loss', 'hop', 'ect_weight', 'mu_schedule', 'tcm_weight', 'student_grid')
    ),
    put('update', 'scale', 'x'),
    put('update', 'optimizer', 'state', {1: {}}),
    put('update', 'optimizer', 'state', {0: {'exp_avg': 'x'}}),
    put('update', 'bad_steps', 7),
    put('averages', 'phema', {'0.1': {}}),
    put('averages', 'ema', {'x': 'y'}),
    put('net', 'x', torch.ones(2).bool().char()),
    put('rng', [{}]),
    put('rng', [{'cpu': 'x'}]),
    put('rng', [{'cpu': torch.ones(3)}]),
    put('stats', [['x']]),
    put('stats', [[['x'], torch.ones(1, 3)]]),
]


@pytest.mark.parametrize('change', HOSTILE, ids=range(len(HOSTILE)))
def test_a_state_that_holds_anything_else_is_refused_in_one_line(tmp_path, state, change):
    odd = copy.deepcopy(state)
    change(odd)
    save_state(tmp_path / 'training-state-000000.pt', odd)
    with pytest.raises(UserError, match='training state') as caught:
        read_state(tmp_path / 'training-state-000000.pt', RECORDED)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 1000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=20), inner),
)


@given(JSON, st.sampled_from([name for table in (run_schema.PROGRESS, RECORDED) for name in table.fields]))
def test_any_entry_is_of_its_kind_or_a_mismatch(value, name):
    """Nothing else is raised, whatever JSON lies there; and what passes survives being written and read."""
    for table in (run_schema.PROGRESS, RECORDED, run_schema.METADATA, run_log.LINE):
        for record in (value, {name: value}):
            try:
                check(record, table, 'it')
            except Mismatch as error:
                assert str(error).isprintable() and len(str(error)) < 1000
            else:
                assert json.dumps(check(json.loads(json.dumps(record)), table, 'it')) == json.dumps(record)


def test_states_of_runs_are_read_whole(folder, state):
    found = read_state(saved_states(folder)[0])
    assert (
        found['options'] == json.loads(state['options'])
        and found['progress'] == state['progress']
        and found.keys() == state.keys()
    )


def test_entries_that_newer_versions_may_add_are_left_alone(tmp_path, state):
    more = copy.deepcopy(state)
    for change in (
        put('extra', [1]),
        put('progress', 'extra', [1]),
        put('options', 'extra', {'a': [1.5]}),
        put('options', 'loss', 'extra', 'x'),
    ):
        change(more)
    save_state(tmp_path / 'training-state-000000.pt', more)
    assert read_state(tmp_path / 'training-state-000000.pt', RECORDED)['options']['extra'] == {'a': [1.5]}


@pytest.mark.parametrize('name', ['../victim', None])
def test_resuming_deletes_nothing_outside_of_the_run_folder(tmp_path, digits, state, name):
    """The names of states in a state are those of files that are deleted when newer ones are whole."""
    victim = tmp_path / 'victim.pt'
    victim.write_text('precious')
    odd = copy.deepcopy(state)
    put('progress', 'states', {name or str(victim.with_suffix('')): None, **odd['progress']['states']})(odd)
    (tmp_path / 'run').mkdir()
    save_state(tmp_path / 'run' / 'training-state-000000.pt', odd)
    result = run(
        'train.py',
        f'--outdir={tmp_path / "run"}',
        f'--data={digits}',
        '--cond=1',
        *TINY_NETWORK,
        *FAST,
        '--batch=64',
        '--duration=0.000256',
        '--tick=0.064',
        '--dump=1',
        '--augment=0',
        '--phema=0.1',
        '--max-images=128',
        '--keep=1',
        f'--resume={tmp_path / "run" / "training-state-000000.pt"}',
        check=False,
    )
    assert_one_clear_error(result, 'training-state-000000.pt', 'the name of a saved file')
    assert victim.read_text() == 'precious'


@pytest.mark.parametrize(
    'change, words',
    [
        (
            lambda state: state['update']['optimizer']['state'][0].update(exp_avg=torch.zeros(7)),
            'exp_avg of shape [7]',
        ),
        (
            lambda state: state.update(stats=[(['a', 'b'], torch.zeros(1, 3, dtype=torch.float64))]),
            'statistics of 2 names',
        ),
        (
            lambda state: state['rng'][0].update(cpu=torch.zeros(3, dtype=torch.uint8)),
            'another run or network',
        ),
        (lambda state: state['averages'].update(phema={}), 'another run or network'),
    ],
)
def test_a_state_that_does_not_fit_the_network_is_refused_when_it_is_put_in(
    tmp_path, digits, state, change, words
):
    odd = copy.deepcopy(state)
    change(odd)
    save_state(tmp_path / 'training-state-000000.pt', odd)
    result = run(
        'train.py',
        f'--outdir={tmp_path}',
        f'--data={digits}',
        '--cond=1',
        *TINY_NETWORK,
        *FAST,
        '--batch=64',
        '--duration=0.000256',
        '--tick=0.064',
        '--augment=0',
        '--phema=0.1',
        '--max-images=128',
        f'--resume={tmp_path}',
        check=False,
    )
    assert_one_clear_error(result, 'training-state-000000.pt', words)


# ----------------------------------------------------------------------------
# Snapshots.


@pytest.mark.parametrize(
    'metadata',
    [
        dict(S=10**9),
        dict(S='8'),
        dict(S=3),
        dict(rho=0),
        dict(rho=NAN),
        dict(sigma_min='x'),
        dict(sigma_max=-1),
        dict(sigma_data=NAN),
        dict(sigma_data=0),
        dict(student_grid='x'),
        dict(student_grid=7),
        dict(sigmas='x'),
        dict(sigmas=[2, NAN, 0]),
        dict(sigmas=[2, 3, 0]),
        dict(sigmas=[1] * 20_000),
        dict(kimg='x'),
        dict(nimg=-1),
        dict(nimg=10**400),
        dict(fid='x'),
        dict(ema=7),
        dict(ema='a\nb'),
        dict(objective=['x']),
        dict(label_kind='x'),
        dict(clip_denoised='yes'),
        dict(solver=7),
        dict(encoder={}),
    ],
    ids=str,
)
def test_metadata_that_no_snapshot_has_are_refused(tmp_path, teacher, metadata):
    net = load_network(teacher)
    save_snapshot(
        tmp_path / 'net.pkl', net, **{'objective': 'mcd', 'S': 2, 'sigmas': [80.0, 1.0, 0.0], **metadata}
    )
    with pytest.raises(UserError, match=r'net\.pkl cannot be used as a network snapshot'):
        load_network(tmp_path / 'net.pkl')


@pytest.mark.parametrize(
    'name, value',
    [
        ('sigma_data', 0.0),
        ('sigma_data', NAN),
        ('sigma_data', -1.0),
        ('sigma_max', NAN),
        ('sigma_max', 0.0),
        ('sigma_min', -1.0),
        ('sigma_min', INF),
        ('sigma_min', 1e5),
    ],
)
def test_networks_whose_numbers_make_images_of_one_color_are_refused(tmp_path, teacher, name, value):
    """Today's sampler would give them with exit status 0."""
    net = load_network(teacher)
    net.sigma_max = 100.0
    setattr(net, name, value)
    save_snapshot(tmp_path / 'net.pkl', net, objective='diffusion')
    with pytest.raises(UserError, match=rf'net\.pkl cannot be used as a network snapshot.*{name}'):
        load_network(tmp_path / 'net.pkl')


@pytest.mark.parametrize(
    'metadata',
    [dict(S=10**9), dict(rho=0), dict(sigmas=[2, 3, 0]), dict(kimg='x'), dict(classes=[1])],
    ids=str,
)
def test_metadata_of_safetensors_files_are_checked_likewise(tmp_path, teacher, metadata):
    from training.interchange.safetensors import load_safetensors, save_safetensors

    net = load_network(teacher)
    net.metadata = {'objective': 'mcd', 'S': 2, 'sigmas': [80.0, 1.0, 0.0], **metadata}
    save_safetensors(tmp_path / 'net.safetensors', net)
    with pytest.raises(UserError, match=r'net\.safetensors cannot be used'):
        load_safetensors(tmp_path / 'net.safetensors')


# ----------------------------------------------------------------------------
# Statistics and records.

GOOD = b'{"Progress/nimg": {"num": 1, "mean": 64, "std": 0}}\n'


@pytest.mark.parametrize(
    'line, words',
    [
        (b'{"Progress/nimg": {"num": 1, "mean": 1e400, "std": 0}}', 'Progress/nimg'),
        (b'{"Progress/nimg": {"mean": NaN}}', 'Progress/nimg'),
        (b'{"nimg": -5}', 'nimg'),
        (b'{"nimg": 1' + b'0' * 400 + b'}', 'nimg'),
        (b'{"nimg": "x"}', 'nimg'),
        (b'{"Loss": {"mean": Infinity}}', 'Loss'),
        (b'{"a": ' + b'[' * 100 + b']' * 100 + b'}', 'without end'),
        (b'{"a": "' + b'x' * (2 << 20) + b'"}', 'at most'),
    ],
    ids=range(8),
)
@pytest.mark.parametrize('name', ['stats.jsonl', 'metrics-val.jsonl'])
def test_a_line_of_statistics_that_no_run_writes_is_named(tmp_path, name, line, words):
    before = GOOD + line + b'\n' + GOOD
    (tmp_path / name).write_bytes(before)
    with pytest.raises(UserError, match=f'{name}: line 2 .*{words}'):
        forget_future(tmp_path, 10)
    assert (tmp_path / name).read_bytes() == before


def test_nesting_without_end_in_statistics_is_no_record(tmp_path):
    """As any line that is no JSON it is kept, byte for byte."""
    before = GOOD + b'[' * 200_000 + b'\n'
    (tmp_path / 'stats.jsonl').write_bytes(before)
    assert forget_future(tmp_path, 100)[0] == 64
    assert (tmp_path / 'stats.jsonl').read_bytes() == before


@pytest.mark.parametrize('text', ['[]', '{', '[' * 200_000, '{"seed": 0}', 'null'])
def test_a_stage_whose_options_are_damaged_is_named(tmp_path, text):
    (tmp_path / 'training_options.json').write_text(text)
    with pytest.raises(UserError, match=r'training_options\.json is missing or damaged'):
        recorded_options(tmp_path)


def test_every_recorded_option_has_a_kind():
    """A new option has a range from the start: the files of its runs are checked."""
    loss, sampling = (
        RECORDED.fields[name].__dict__.get('kind', RECORDED.fields[name]) for name in ('loss', 'sampling')
    )
    for name, objective in OBJECTIVES.items():
        assert {*objective.options} <= loss.fields.keys(), name
        assert {*objective.config.sampling} <= sampling.fields.keys(), name
    assert {
        option.key for option in RUN.values() if option.key and '.' not in option.key
    } <= RECORDED.fields.keys()
