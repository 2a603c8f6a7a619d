"""Classes without images, labels that are vectors, and labels drawn from a file or from the training set: in training, sampling and measures."""

import contextlib
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import FAST, TINY_NETWORK, assert_one_clear_error, invoke, run, run_ranks
from PIL import Image

import dataset_tool
import edit
import example
import fid
import generate
import search
import train
import validation
from data.dataset import ImageFolderDataset
from data.label_space import Labels, LabelSpace, listed, parse_ranges, space_of
from dnnlib import UserError
from dnnlib.text import as_ranges
from experiments import inputs
from metrics import validator
from metrics.generated import GeneratedImages
from metrics.images import open_images
from sampling import edit_files, generation, label_choosers
from training import networks
from training.checkpoint import load_network, save_snapshot

VECTORS = [[0.5, 0.25], [1, 0], [-3, 7], [0.125, 1]]


def write_data(path, labels, size=8):
    """A data set of random gray images with these labels; None: without."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, 'w') as archive:
        for i in range(len(labels)):
            with archive.open(f'{i:03d}.png', 'w') as file:
                Image.fromarray(rng.integers(0, 255, [size, size], np.uint8)).save(
                    file, format='PNG', compress_level=0
                )
        archive.writestr(
            'dataset.json',
            json.dumps({'labels': [[f'{i:03d}.png', label] for i, label in enumerate(labels)]}),
        )
    return path


def trained(folder, data, *extra):
    """A network after one step; its snapshot says what the data's labels are."""
    result = invoke(
        train.main,
        f'--outdir={folder}',
        f'--data={data}',
        '--cond=1',
        *TINY_NETWORK,
        *FAST,
        '--batch=4',
        '--duration=0.000004',
        '--augment=0',
        '--dump=0',
        *extra,
    )
    assert result.exit_code == 0, result.output
    return max(folder.glob('*.pkl')), result.output


@pytest.fixture(scope='module')
def gaps(tmp_path_factory):
    """(snapshot, data, what training said) of data with images of classes 1, 2 and 4 of five."""
    folder = tmp_path_factory.mktemp('gaps')
    data = write_data(folder / 'data.zip', [4, 1, 2, 1, 1, 2])
    return (*trained(folder / 'run', data), data)


@pytest.fixture(scope='module')
def vectors(tmp_path_factory):
    """(snapshot, data, what training said) of data with label vectors."""
    folder = tmp_path_factory.mktemp('vectors')
    data = write_data(folder / 'data.zip', VECTORS)
    return (*trained(folder / 'run', data), data)


@pytest.fixture(scope='module')
def students(gaps, vectors, tmp_path_factory):
    """The same networks as two-step students, which edit.py takes, and consistency models, which search.py takes."""
    folder, found = tmp_path_factory.mktemp('students'), {}
    for name, (path, *_) in dict(gaps=gaps, vectors=vectors).items():
        net = load_network(path)
        kept = {
            key: net.metadata[key]
            for key in ('label_kind', 'classes', 'dataset_kwargs')
            if key in net.metadata
        }
        found[name] = folder / f'{name}.pkl'
        save_snapshot(found[name], net, objective='ect', solver='cm', sigmas=[80.0, 0.8, 0.0], **kept)
    return found


def labels_of(path, *options):
    """What generate.py gives to seeds 0-39, from both kinds of file, which agree."""
    seen = []
    for name in ('x.npz', 'x.zip'):
        dest = path.parent / name
        dest.unlink(missing_ok=True)
        result = invoke(
            generate.main,
            f'--network={path}',
            f'--dest={dest}',
            '--seeds=0-39',
            '--steps=1',
            '--solver=euler',
            '--workers=0',
            *options,
        )
        assert result.exit_code == 0, result.output
        pairs = name == 'x.zip' and json.loads(zipfile.ZipFile(dest).read('dataset.json'))['labels']
        seen.append(np.array([label for _, label in pairs]) if pairs else np.load(dest)['arr_1'])
    assert np.array_equal(seen[0], seen[1].astype(seen[0].dtype))
    return seen[0]


# ----------------------------------------------------------------------------
# What labels are.


@pytest.mark.parametrize(
    'numbers, text', [([0], '0'), ([1, 2, 3, 7], '1-3,7'), ([0, 2, 4], '0,2,4'), ([5, 6], '5-6')]
)
def test_rising_numbers_are_written_as_ranges_and_read_back(numbers, text):
    assert as_ranges(numbers) == text and parse_ranges(text, 8) == tuple(numbers)


@pytest.mark.parametrize('text', ['', '3-1', '1,1', '2,1', '0-8', '-1', 'x', '1-', '0-999999999', '٣'])
def test_what_is_no_list_of_classes_is_refused_without_counting_to_it(text):
    with pytest.raises(ValueError):
        parse_ranges(text, 8)


def test_a_thousand_classes_with_many_gaps_are_named_in_a_line():
    space = LabelSpace(1000, 'classes', tuple(range(0, 1000, 2)))
    assert (
        len(space.warning()) < 200
        and '500 of 1000 classes have no images: 1, 3, 5' in space.warning()
        and '(500 in all)' in space.warning()
    )
    assert listed(range(1, 999)) == '1-998' and LabelSpace(1000, 'classes').warning() is None


def test_vectors_that_are_all_one_hot_are_classes_and_others_are_not():
    classes = Labels.of_data(np.float32([[0, 1, 0], [0, 0, 1]]))
    assert (
        classes.space == LabelSpace(3, 'classes', (1, 2))
        and classes[1].tolist() == [0, 0, 1]
        and classes[0].dtype == np.float32
    )
    for rows in ([[0, 1], [0.5, 0.5]], [[0, 2], [1, 0]], [[0, 0], [1, 0]], [[1, 1], [1, 0]]):
        assert Labels.of_data(np.float32(rows)).space == LabelSpace(2, 'vectors')


def test_a_subset_leaves_classes_without_images_and_vectors_vectors(tmp_path):
    """EDM's subset of 2 of 4, seed 0: images 2 and 3 (numpy's permutation [2, 3, 1, 0])."""
    dataset = ImageFolderDataset(write_data(tmp_path / 'a.zip', [0, 3, 1, 1]), use_labels=True, max_size=2)
    assert (
        dataset.label_space == LabelSpace(4, 'classes', (1,))
        and dataset.label_dim == 4
        and dataset.get_label(0).tolist() == [0, 1, 0, 0]
    )
    dataset = ImageFolderDataset(
        write_data(tmp_path / 'b.zip', [[0.5, 2], [0, 0], [1, 0], [0, 1]]), use_labels=True, max_size=2
    )
    assert dataset.label_space == LabelSpace(2, 'vectors')


def test_a_class_is_one_draw_however_many_classes_there_are():
    """So churn noise, which comes after it, is EDM's; and where all classes have images, so is the class."""
    after = []
    for classes in (None, (1, 2, 4), (3,)):
        noise = generation.SeededNoise([7, 8], 'cpu')
        labels = generation.uniform_labels(noise, 5, classes)
        assert labels.shape == (2, 5) and (classes is None or set(labels.argmax(1).tolist()) <= set(classes))
        after.append(noise.randn([3]))
    assert torch.equal(after[0], after[1]) and torch.equal(after[0], after[2])
    assert generation.uniform_over(LabelSpace(5, 'classes')) is generation.uniform_labels


# ----------------------------------------------------------------------------
# Classes without images.


def test_training_warns_of_classes_without_images_and_snapshots_record_the_others(gaps):
    path, said, _ = gaps
    assert '2 of 5 classes have no images: 0, 3.' in said and '6 images of [1, 8, 8], 5 classes' in said
    metadata = load_network(path).metadata
    assert (
        metadata['label_kind'] == 'classes'
        and metadata['classes'] == '1-2,4'
        and space_of(load_network(path)).absent == [0, 3]
    )


def test_without_gaps_there_is_no_record_and_no_warning(teacher):
    assert 'classes' not in load_network(teacher).metadata and space_of(load_network(teacher)) == LabelSpace(
        10, 'classes'
    )


def test_images_are_drawn_of_classes_that_have_images_uniformly_or_as_the_data_are(gaps):
    """Of 40 seeds; the data are of class 1 by half."""
    path, *_ = gaps
    assert set(labels_of(path)) == {1, 2, 4} and labels_of(path).dtype == np.int64
    latents_first = generation.SeededNoise(range(40), 'cpu')
    latents_first.randn([1, 8, 8])
    expected = np.array([1, 2, 4])[latents_first.randint(3)]
    assert np.array_equal(labels_of(path), expected)
    drawn = labels_of(path, '--labels=data')
    assert set(drawn) == {1, 2, 4} and 12 <= (drawn == 1).sum() <= 28


def test_balanced_labels_come_in_turn_and_leave_all_other_noise_as_it_is(gaps, vectors):
    """The label follows from the seed alone, not from its batch; a class without images has no turn."""
    path, *_ = gaps
    assert np.array_equal(labels_of(path, '--labels=balanced'), np.resize([1, 2, 4], 40))
    assert np.array_equal(labels_of(path, '--labels=balanced', '--batch=7'), np.resize([1, 2, 4], 40))
    net = load_network(path)
    _, latents, _ = generation.draw_start(net, range(5))
    drawn, same, _ = generation.draw_start(
        net, range(5), label_choosers.choose(net, 'net', labels='balanced')
    )
    after = generation.draw_start(net, range(5))[0].randn([3])
    assert torch.equal(latents, same) and torch.equal(drawn.randn([3]), after)
    # fid.py resamples each of three classes by itself, if seeds follow one another.
    balanced = label_choosers.choose(net, 'net', labels='balanced')
    for seeds, classes in ((range(4, 9), 3), ([4, 6], 1), ([4, 8, 3], 3)):
        assert GeneratedImages(net, seeds, 4, balanced).strata == classes
    assert GeneratedImages(net, range(4), 4).strata == 1
    arguments = f'--network={vectors[0]}', '--outdir=none', '--labels=balanced'
    assert_one_clear_error(invoke(generate.main, *arguments), 'label vectors of 2 numbers', '--labels=data')


def test_classes_are_resampled_by_themselves_only_if_images_are_of_all_in_turn(gaps, tmp_path, capsys):
    """A number that is given has to be that of classes in turn, of ten images each."""
    path, *_ = gaps
    net = load_network(path)
    balanced = label_choosers.choose(net, 'net', labels='balanced')
    in_turn, few, drawn = (
        GeneratedImages(net, seeds, 4, *labels)
        for seeds, labels in ((range(30), [balanced]), (range(29), [balanced]), (range(30), []))
    )
    assert [fid.strata_of(in_turn, 30, given) for given in (None, 1, 3)] == [3, 1, 3]
    assert fid.strata_of(drawn, 30, None) == 1
    for source, given, problem in (
        (in_turn, 5, 'are of 3 classes in turn'),
        (drawn, 3, 'are of no classes in turn; give --labels=balanced'),
        (few, 3, '29 images are fewer than 10 of each class'),
    ):
        with pytest.raises(UserError, match=problem):
            fid.strata_of(source, len(source), given)
    # Without the option, what cannot be resampled so is said.
    assert not capsys.readouterr().err
    assert fid.strata_of(in_turn, 29, None) == 1 and 'not all' in capsys.readouterr().err
    assert fid.strata_of(few, 29, None) == 1 and 'fewer than 10 of each' in capsys.readouterr().err

    # Files say it by their labels, if they have any.
    for name, labels in (('turns', [0, 1] * 10), ('sorted', [0] * 10 + [1] * 10)):
        data = open_images(write_data(tmp_path / f'{name}.zip', labels))
        with (
            pytest.raises(UserError, match='by their labels')
            if name == 'sorted'
            else contextlib.nullcontext()
        ):
            assert fid.strata_of(data, 20, 2) == 2


@pytest.mark.parametrize(
    'option, words',
    [
        ('--class=0', ['no images of class 0', 'classes with images are 1-2, 4']),
        ('--class=3', ['no images of class 3']),
        ('--class=5', ['--class=5 does not exist', '5 classes']),
    ],
)
def test_a_class_that_was_never_trained_is_refused_by_every_command(tmp_path, gaps, students, option, words):
    network, data = f'--network={gaps[0]}', gaps[2]
    np.savez_compressed(tmp_path / 'ref.npz', mu=np.zeros(2048), sigma=np.eye(2048))  # Inception's
    consistency = f'--network={students["gaps"]}'
    for command, arguments in (
        (generate.main, [network, f'--outdir={tmp_path / "o"}', option]),
        (fid.main, ['calc', network, '--seeds=0-3', f'--ref={tmp_path / "ref.npz"}', option]),
        (
            search.main,
            [
                consistency,
                f'--log={tmp_path / "log.jsonl"}',
                f'--ref={tmp_path / "ref.npz"}',
                '--dry-run',
                option,
            ],
        ),
        (
            edit.main,
            [
                'inpaint',
                consistency,
                f'--input={data}',
                f'--outdir={tmp_path / "o"}',
                '--box=0,0,4,4',
                option,
            ],
        ),
        (edit.main, ['interpolate', network, '--seeds=0,1', f'--outdir={tmp_path / "o"}', option]),
    ):
        assert_one_clear_error(invoke(command, *arguments), *words)
    assert not (tmp_path / 'o').exists()
    mode = option.replace('--class=', 'fixed:')
    with pytest.raises(UserError, match='fixed'):
        validator.label_chooser(mode, space_of(load_network(gaps[0])))


def test_labels_of_an_input_that_were_never_trained_are_refused(tmp_path, students):
    data = write_data(tmp_path / 'other.zip', [1, 0])
    arguments = [
        'inpaint',
        f'--network={students["gaps"]}',
        f'--input={data}',
        f'--outdir={tmp_path / "o"}',
        '--box=0,0,4,4',
    ]
    assert_one_clear_error(invoke(edit.main, *arguments), 'classes 0', 'never trained', '--class')
    assert invoke(edit.main, *arguments, '--class=4').exit_code == 0


def test_the_example_shows_classes_that_have_images(tmp_path, gaps, monkeypatch):
    seen = []
    monkeypatch.setattr(example, 'heun_sample', lambda net, x, labels: seen.append(labels.argmax(1)) or x)
    example.main(gaps[0], tmp_path / 'grid.png')
    assert seen[0].tolist() == [1, 2, 4] * 13 + [1]


def test_the_example_refuses_what_it_would_sample_wrongly(tmp_path, consistency_model):
    with pytest.raises(UserError, match='is a consistency model'):
        example.main(consistency_model, tmp_path / 'grid.png')
    assert not (tmp_path / 'grid.png').exists()


def test_dataset_tool_warns_of_classes_without_images(tmp_path):
    result = invoke(
        dataset_tool.main,
        f'--source={write_data(tmp_path / "a.zip", [3, 1])}',
        f'--dest={tmp_path / "b.zip"}',
    )
    assert '2 of 4 classes have no images: 0, 2.' in result.stderr, result.output
    result = invoke(
        dataset_tool.main,
        f'--source={write_data(tmp_path / "a.zip", VECTORS)}',
        f'--dest={tmp_path / "b.zip"}',
    )
    assert 'Warning' not in result.stderr and 'with label vectors of 2 numbers' in result.stdout


def test_a_teacher_without_images_of_some_of_the_data_s_classes_is_warned_of(tmp_path, gaps):
    data = write_data(tmp_path / 'data.zip', [4, 0, 2, 0])
    result = invoke(
        train.main,
        f'--outdir={tmp_path / "run"}',
        f'--data={data}',
        '--cond=1',
        '--consistency=True',
        f'--teacher={gaps[0]}',
        *FAST,
        '--batch=4',
        '--duration=0.000004',
        '--dump=0',
        '--S=2',
    )
    assert (
        result.exit_code == 0 and 'no images of classes 0, of which these data have some' in result.output
    ), result.output
    assert load_network(max((tmp_path / 'run').glob('*.pkl'))).metadata['classes'] == '0,2,4'


@pytest.mark.parametrize('classes', ['0-9', '2-1', [1, 2], 'all'])
def test_a_snapshot_whose_classes_cannot_be_is_damaged(tmp_path, gaps, classes):
    net = load_network(gaps[0])
    save_snapshot(tmp_path / 'net.pkl', net, objective='diffusion', label_kind='classes', classes=classes)
    with pytest.raises(UserError, match='metadata with'):
        load_network(tmp_path / 'net.pkl')


def test_snapshots_without_a_record_have_all_classes_as_before(tmp_path):
    net = networks.EDMPrecond(
        8, 1, label_dim=3, model_type='DhariwalUNet', model_channels=8, channel_mult=[1], num_blocks=1
    )
    with open(tmp_path / 'edm.pkl', 'wb') as file:
        pickle.dump(
            dict(ema=net.eval().requires_grad_(False), loss_fn=None, augment_pipe=None, dataset_kwargs={}),
            file,
        )
    assert space_of(load_network(tmp_path / 'edm.pkl')) == LabelSpace(3)
    assert set(labels_of(tmp_path / 'edm.pkl')) == {0, 1, 2}
    np.save(tmp_path / 'v.npy', np.float32([[0.5, 0, 2]]))
    assert labels_of(tmp_path / 'edm.pkl', f'--labels={tmp_path / "v.npy"}').tolist() == [[0.5, 0, 2]] * 40


# ----------------------------------------------------------------------------
# Vectors.


def test_vectors_are_recorded_and_called_vectors(vectors):
    path, said, _ = vectors
    assert '4 images of [1, 8, 8], label vectors of 2 numbers' in said and 'classes' not in said
    assert (
        load_network(path).metadata['label_kind'] == 'vectors'
        and 'classes' not in load_network(path).metadata
    )


def test_vectors_are_drawn_from_the_data_and_written_as_they_are(vectors):
    drawn = labels_of(vectors[0], '--labels=data')
    assert drawn.dtype == np.float32 and {tuple(row) for row in drawn.tolist()} == {
        tuple(map(float, row)) for row in VECTORS
    }


def test_two_processes_draw_the_vectors_of_one(tmp_path, vectors):
    options = [
        'generate.py',
        f'--network={vectors[0]}',
        '--seeds=0-6',
        '--batch=2',
        '--steps=1',
        '--solver=euler',
        '--labels=data',
        '--workers=0',
    ]
    run_ranks(2, *options, f'--dest={tmp_path / "two.npz"}')
    run(*options, f'--dest={tmp_path / "one.npz"}')
    assert np.array_equal(*(np.load(tmp_path / name)['arr_1'] for name in ('one.npz', 'two.npz')))


def test_a_file_of_vectors_reaches_the_network(tmp_path, vectors):
    """Another file of one row gives other images of the same seeds; a float64 file the same as a float32 one."""
    images = []
    for i, rows in enumerate((np.float32([[0.5, 9]]), np.float64([[0.5, 9]]), np.float32([[3, -2]]))):
        np.save(tmp_path / f'{i}.npy', rows)
        net = load_network(vectors[0])
        rng = torch.Generator().manual_seed(0)
        for parameter in net.parameters():  # many are zero at first, and hide labels
            parameter.normal_(std=0.1, generator=rng)
        choose = label_choosers.choose(net, 'net', labels=str(tmp_path / f'{i}.npy'))
        images.append(generation.generate_latents(net, [0, 1], choose, 'euler', 2))
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


@pytest.mark.parametrize('options', [[], ['--class=0'], ['--class=1']])
def test_vector_networks_are_not_sampled_by_class_in_any_command(tmp_path, vectors, students, options):
    network, consistency = f'--network={vectors[0]}', f'--network={students["vectors"]}'
    np.savez_compressed(tmp_path / 'ref.npz', mu=np.zeros(2048), sigma=np.eye(2048))  # Inception's
    pictures = tmp_path / 'pictures'
    pictures.mkdir()
    Image.new('L', (8, 8)).save(pictures / 'a.png')
    for command, arguments in (
        (generate.main, [network, f'--outdir={tmp_path / "o"}']),
        (fid.main, ['calc', network, '--seeds=0-3', f'--ref={tmp_path / "ref.npz"}']),
        (
            search.main,
            [consistency, f'--log={tmp_path / "log.jsonl"}', f'--ref={tmp_path / "ref.npz"}', '--dry-run'],
        ),
        (
            edit.main,
            ['inpaint', consistency, f'--input={pictures}', f'--outdir={tmp_path / "o"}', '--box=0,0,4,4'],
        ),
        (edit.main, ['interpolate', network, '--seeds=0,1', f'--outdir={tmp_path / "o"}']),
    ):
        assert_one_clear_error(
            invoke(command, *arguments, *options), 'label vectors of 2 numbers', '--labels=data'
        )
    assert not (tmp_path / 'o').exists()
    with pytest.raises(UserError, match='label vectors of 2 numbers'):
        generation.generate_latents(load_network(vectors[0]), [0])
    with pytest.raises(UserError, match='and this example knows classes only'):
        example.main(vectors[0], tmp_path / 'grid.png')


def test_the_vectors_of_an_input_are_used_by_edits(tmp_path, vectors, students):
    arguments = ['inpaint', f'--network={students["vectors"]}', f'--input={vectors[2]}', '--box=0,0,4,4']
    for name, extra in (('own', []), ('drawn', ['--labels=data'])):
        result = invoke(edit.main, *arguments, f'--outdir={tmp_path / name}', *extra)
        assert result.exit_code == 0 and len(list((tmp_path / name / 'images').iterdir())) == 4, result.output
    source = edit.open_input(str(vectors[2]), [2, 0])
    assert edit_files.labels_for(load_network(vectors[0]), str(vectors[2]), source).tolist() == [
        VECTORS[2],
        VECTORS[0],
    ]


@pytest.mark.parametrize(
    'mode, problem',
    [
        ('uniform', 'label mode uniform is for classes'),
        ('fixed:1', 'label mode fixed:1'),
        ('auto', None),
        ('dataset', None),
    ],
)
def test_validation_in_training_of_vectors_takes_the_data_s(vectors, mode, problem):
    dataset = ImageFolderDataset(vectors[2], use_labels=True)
    if problem:
        with pytest.raises(UserError, match=problem):
            validator.label_chooser(mode, dataset.label_space, dataset)
    else:
        labels = validator.label_chooser(mode, dataset.label_space, dataset)(
            generation.SeededNoise(range(40), 'cpu'), 2
        )
        assert {tuple(row) for row in labels.tolist()} == {tuple(map(float, row)) for row in VECTORS}


def test_a_uniform_validation_of_vectors_ends_before_training(tmp_path, vectors, rulers):
    result = invoke(
        train.main,
        f'--outdir={tmp_path / "run"}',
        f'--data={vectors[2]}',
        '--cond=1',
        *TINY_NETWORK,
        *FAST,
        '--batch=4',
        '--duration=0.000008',
        '--augment=0',
        '--val=1',
        f'--val_ref={rulers / "pca.npz"}',
        f'--val_detector={rulers / "pca.pt"}',
        '--val_label=uniform',
    )
    assert_one_clear_error(result, 'label mode uniform is for classes')
    assert not list((tmp_path / 'run').glob('*.pkl'))


def test_validation_from_the_command_line_takes_labels(tmp_path, vectors, rulers):
    options = [
        f'--network={vectors[0]}',
        f'--ref={rulers / "pca.npz"}',
        f'--detector={rulers / "pca.pt"}',
        '--num=8',
        f'--outdir={tmp_path}',
        '--steps=2',
    ]
    assert_one_clear_error(invoke(validation.main, *options), '--labels=data')
    assert_one_clear_error(
        invoke(validation.main, *options, '--labels=data', '--label=fixed:1'),
        '--label and --labels',
        status=2,
    )
    result = invoke(validation.main, *options, '--labels=data')
    assert result.exit_code == 0 and json.loads(result.stdout.splitlines()[-1])['num_images'] == 8, (
        result.output
    )


def test_classes_and_vectors_of_one_length_are_not_each_other_s_teachers(tmp_path, vectors):
    data = write_data(tmp_path / 'classes.zip', [0, 1])
    result = invoke(
        train.main,
        f'--outdir={tmp_path / "run"}',
        f'--data={data}',
        '--cond=1',
        '--consistency=True',
        f'--teacher={vectors[0]}',
    )
    assert_one_clear_error(result, '8x8x1 with label vectors of 2 numbers', 'gives 8x8x1 with 2 classes')
    _, said = trained(tmp_path / 'run', data, f'--transfer={vectors[0]}')
    assert 'was trained with label vectors of 2 numbers, and these data have 2 classes' in said


def test_a_data_set_of_a_teacher_s_first_classes_says_so_by_one_hot_vectors(tmp_path, gaps):
    for labels, words in (
        ([1, 2], 'one-hot vectors of length 5 in dataset.json'),
        (np.eye(5, dtype=int)[[1, 2]].tolist(), None),
    ):
        data = write_data(tmp_path / 'data.zip', labels)
        result = invoke(
            train.main,
            f'--outdir={tmp_path}',
            f'--data={data}',
            '--cond=1',
            '--consistency=True',
            f'--teacher={gaps[0]}',
            '--dry-run',
        )
        if words:
            assert_one_clear_error(result, '8x8x1 with 5 classes', 'gives 8x8x1 with 3 classes', words)
        else:
            assert json.loads(result.stdout)['dataset']['classes'] == '1-2', result.output


def test_a_comparison_samples_everyone_with_the_same_labels(tmp_path, vectors, gaps, teacher, digits):
    told = inputs.describe_teacher(str(vectors[0]), str(vectors[2]), ['mcd'])
    assert told.labels.tolist() == VECTORS and inputs.describe_teacher(
        str(gaps[0]), str(gaps[2]), ['mcd']
    ).labels.tolist() == [1, 2, 4]
    assert inputs.describe_teacher(str(teacher), str(digits), ['mcd']).labels is None
    assert (
        np.load(inputs.write_labels(tmp_path, told.labels)).tolist() == VECTORS
        and inputs.write_labels(tmp_path, None) is None
    )


# ----------------------------------------------------------------------------
# Files of labels.

CLASSES, ROWS = LabelSpace(5, 'classes', (1, 2, 4)), LabelSpace(2, 'vectors')
BAD = {
    'a class without images': (CLASSES, np.array([1, 3]), 'classes 3'),
    'beyond': (CLASSES, np.array([5]), 'has 5 classes, 0 to 4'),
    'negative': (CLASSES, np.array([-1, 1]), 'has 5 classes, 0 to 4'),
    'not one-hot': (CLASSES, np.float32([[0, 0.5, 0.5, 0, 0]]), 'not one-hot'),
    'one-hot of an absent class': (CLASSES, np.eye(5)[[0]], 'classes 0'),
    'floating-point classes': (CLASSES, np.array([1.0, 2.0]), 'float64 [2]'),
    'wrong length': (CLASSES, np.eye(4), 'float64 [4, 4]'),
    'truth values': (CLASSES, np.array([True]), 'bool [1]'),
    'none': (CLASSES, np.array([], dtype=np.int64), 'int64 [0]'),
    'text': (CLASSES, np.array(['1']), '<U1 [1]'),
    'three dimensions': (ROWS, np.zeros([2, 2, 2]), 'float64 [2, 2, 2]'),
    'indices for vectors': (ROWS, np.array([0, 1]), 'int64 [2]'),
    'not a number': (ROWS, np.float32([[np.nan, 0], [1, 2]]), '1 of 2 rows'),
    'not finite in float32': (ROWS, np.array([[1e300, 0]]), '1 of 1 rows'),
    'a number': (ROWS, np.float32(1), 'float32 []'),
}


@pytest.mark.parametrize('case', BAD)
def test_a_file_that_holds_no_labels_of_the_network_is_refused(tmp_path, case):
    space, values, words = BAD[case]
    np.save(tmp_path / 'x.npy', values)
    with pytest.raises(UserError) as error:
        label_choosers.read_labels(str(tmp_path / 'x.npy'), space, 'net.pkl')
    assert words in str(error.value) and 'x.npy' in str(error.value)


@pytest.mark.parametrize(
    'values, space, expected',
    [
        (np.uint8([1, 4]), CLASSES, [1, 4]),
        (np.eye(5)[[4, 2]], CLASSES, [4, 2]),
        (np.eye(5, dtype=np.int32)[[1]], CLASSES, [1]),
        (np.int16([[1, 2]]), ROWS, [[1, 2]]),
        (np.eye(2), ROWS, [[1, 0], [0, 1]]),
        (np.asfortranarray([[0.5, 2], [3, 4]]), ROWS, [[0.5, 2], [3, 4]]),
    ],
)
def test_classes_one_hot_rows_and_vectors_are_read(tmp_path, values, space, expected):
    np.save(tmp_path / 'x.npy', values)
    assert label_choosers.read_labels(str(tmp_path / 'x.npy'), space, 'net.pkl').values.tolist() == expected


def test_hostile_and_other_files_are_refused(tmp_path, vectors):
    np.save(tmp_path / 'object.npy', np.array([[print, 1]], dtype=object), allow_pickle=True)
    whole = (np.save(tmp_path / 'x.npy', np.zeros([4, 2])), (tmp_path / 'x.npy').read_bytes())[1]
    (tmp_path / 'claims.npy').write_bytes(whole.replace(b'(4, 2)', b'(4444444444, 2)'.ljust(6))[: len(whole)])
    (tmp_path / 'short.npy').write_bytes(whole[:-8])
    np.savez(tmp_path / 'x.npz', np.zeros([4, 2]))
    for name, words in (
        ('object.npy', 'readable .npy'),
        ('claims.npy', 'readable .npy'),
        ('short.npy', 'readable .npy'),
        ('x.npz', 'is no .npy file'),
        ('nowhere.npy', 'nowhere.npy'),
    ):
        result = invoke(
            generate.main,
            f'--network={vectors[0]}',
            f'--dest={tmp_path / "o.npz"}',
            f'--labels={tmp_path / name}',
        )
        assert_one_clear_error(result, words)


def test_class_and_labels_exclude_each_other_and_need_labels(tmp_path, gaps, latent_free):
    result = invoke(
        generate.main, f'--network={gaps[0]}', f'--dest={tmp_path / "o.npz"}', '--class=1', '--labels=data'
    )
    assert_one_clear_error(result, '--class and --labels', status=2)
    result = invoke(
        generate.main, f'--network={latent_free}', f'--dest={tmp_path / "o.npz"}', '--labels=data'
    )
    assert_one_clear_error(result, 'takes no labels')


@pytest.fixture
def latent_free(tmp_path):
    """A snapshot without labels."""
    net = networks.EDMPrecond(
        8, 1, model_type='DhariwalUNet', model_channels=8, channel_mult=[1], num_blocks=1
    )
    save_snapshot(tmp_path / 'plain.pkl', net, objective='diffusion')
    return tmp_path / 'plain.pkl'


@pytest.mark.parametrize(
    'record, words',
    [
        ({}, 'does not record its training set'),
        (dict(path=7), 'does not record'),
        (dict(path='/nowhere/data.zip'), '/nowhere/data.zip, is not there'),
        (dict(digest='0' * 64), 'holds another data set (6 images, 5 classes)'),
        (dict(max_size='x'), 'does not record'),
        (dict(max_size=True), 'does not record'),
    ],
)
def test_a_training_set_that_is_not_there_is_an_error_with_the_cure(tmp_path, gaps, record, words):
    net = load_network(gaps[0])
    kwargs = dict(path=str(gaps[2]), **record) if record and 'path' not in record else record
    save_snapshot(
        tmp_path / 'net.pkl', net, objective='diffusion', label_kind='classes', dataset_kwargs=kwargs
    )
    result = invoke(
        generate.main, f'--network={tmp_path / "net.pkl"}', f'--dest={tmp_path / "o.npz"}', '--labels=data'
    )
    assert_one_clear_error(result, words, '--labels=FILE.npy')


def test_features_are_not_taken_from_the_cache_where_the_file_of_labels_has_changed(
    tmp_path, vectors, rulers
):
    """The file keeps its name; what decides the images is its contents."""
    identities = []
    for rows in ([[0.5, 1]], [[2, 1]], [[0.5, 1]]):
        np.save(tmp_path / 'x.npy', np.float32(rows))
        sampling = dict(
            class_idx=None, labels=str(tmp_path / 'x.npy'), solver='euler', steps=1, force_steps=False
        )
        with CliRunner().isolation(), fid.calc.make_context('calc', ['--help'], resilient_parsing=True):
            identities.append(
                fid.images_of_network(str(vectors[0]), [('0', [0])], sampling, 4)[0].fingerprint()
            )
    assert identities[0] == identities[2] != identities[1]
