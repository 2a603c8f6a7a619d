"""Whether a resumed run is the one that its training state was made by: data and settings, then and now."""

from __future__ import annotations

import json
from collections.abc import Iterable

import click

from dnnlib import EasyDict, UserError
from dnnlib.text import printable
from training import config_file
from training.command_line import ALL, OWN, Options


def load_earlier(resume: str) -> tuple[str, dict]:
    """(path, contents) of the training state that --resume names: itself, or the newest whole one of a folder."""
    from torch_utils import distributed
    from training import checkpoint, recorded, run_files

    path, state = None, None
    if distributed.is_main():
        path, state = run_files.load_state(resume, report=lambda line: click.echo(printable(line), err=True))
    path = distributed.broadcast_object(path)
    return path, state or checkpoint.read_state(path, recorded.RECORDED)


# Options of every run whose defaults may change from one version to the next.
KEPT = [
    'batch',
    'duration',
    'optim',
    'lr',
    'lr_rampup',
    'lr_schedule',
    'lr_decay',
    'beta2',
    'ema',
    'ema_rampup',
    'phema',
    'augment',
    'dropout',
]


def options_of_run(earlier: dict | None, objective: str, own: Iterable[str]) -> dict:
    """What a run was trained with, as options that take the place of defaults where it is resumed: whatever the defaults have become
    since, the same command goes on with the same training.

    Args:
        earlier: its configuration; None, and one of another objective, have none.
        own: names of the objective's own options among them.
    """
    if not earlier or earlier.get('objective') != objective:
        return {}
    recorded = config_file.recorded_options(earlier, ALL)
    kept = {
        name: recorded.get(name)
        for name in (*KEPT, *own, 'P_mean', 'P_std')
        if name in KEPT or name in OWN[objective]
    }
    return {name: value for name, value in kept.items() if value is not None} | dict(
        dout_resolutions=recorded.get('dout_resolutions')
    )


def check_same_run(o: Options, c: EasyDict, earlier: dict) -> None:
    """UserError, naming the setting, where the resumed run would be another one."""

    def settings(config):
        names = (
            'objective',
            'teacher_digest',
            'encoder',
            'batch_size',
            'seed',
            'augment',
            'phema_stds',
            'precision',
            'optim',
        )
        chosen = {name: config.get(name) for name in names}
        return {
            **chosen,
            'network': config['network']['class_name'],
            **config['network']['kwargs'],
            **config['loss'],
        }

    then, now = settings(earlier), settings(json.loads(json.dumps(c)))
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            raise UserError(
                f'--resume={o.run.resume} was trained with {name} = {json.dumps(then.get(name))}, these options say '
                f'{json.dumps(now.get(name))}: resume with the options it was made with, or add --resume-override'
            )


def data_record(o: Options, dataset) -> EasyDict:
    """The training set as plain data: how it is opened, and what tells it from others, the same on all processes."""
    from torch_utils import distributed

    space, some = dataset.label_space, dataset.num_images < dataset.num_files
    digest = distributed.broadcast_object(dataset.digest() if distributed.is_main() else None)
    return EasyDict(
        path=o.run.data,
        use_labels=o.run.cond,
        resolution=dataset.resolution,
        xflip=o.run.xflip,
        cache=dataset.caches,
        max_size=dataset.num_images if some else None,
        num_images=dataset.num_images,
        image_shape=dataset.image_shape,
        label_dim=space.dim,
        **space.record(),
        digest=digest,
    )


DATA_FACTS = (
    dict(  # what tells data from others besides their digest: in words, and each of the two values in words
        use_labels=('--cond={} then, --cond={} now', int),
        xflip=('xflip = {} then, {} now', json.dumps),
        max_size=(
            '{} then, {} now',
            lambda value: 'all images' if value is None else f'--max-images={value}',
        ),
        num_images=('{} images then, {} now', int),
        image_shape=('images of {} then, of {} now', '{0[2]}x{0[1]}x{0[0]}'.format),
        label_dim=('labels of length {} then, {} now', int),
        label_kind=('{} then, {} now', lambda value: value or 'no labels'),
        classes=('images of class {} then, {} now', lambda value: value or 'each'),
    )
)


def check_same_data(o: Options, now: dict, then: dict, source: str) -> str | None:
    """A line for people about the data of a run that is resumed, where there is something to say.

    Args:
        now, then: `data_record` of these options, and what `source`, a state or a folder, has recorded.
    Raises: UserError, which names what differs, where they are other data, unless --allow-other-data. For mirrored images of the same data,
        --resume-override does too.
    """
    now, recorded = (
        json.loads(json.dumps(now)),
        'digest' in then,
    )  # older versions recorded some of it, and had no --max-images
    words = {
        name: text.format(name_it(then.get(name)), name_it(now.get(name)))
        for name, (text, name_it) in DATA_FACTS.items()
        if (recorded or name in then or name == 'max_size') and then.get(name) != now.get(name)
    }
    if recorded and then['digest'] != now['digest'] and not words:
        words = {'digest': 'other names, sizes, contents or labels of files'}
    listed, mirrored = '; '.join(words.values()), words.keys() == {'xflip'}
    if words and not (o.run.allow_other_data or (mirrored and o.run.resume_override)):
        cure = '--allow-other-data' + ' or --resume-override' * mirrored
        raise UserError(
            f'--resume={source} was trained on other data than --data={o.run.data}: {listed}. '
            f'Resume with the data it was made with, or add {cure}'
        )
    if words:
        return f'Warning: {source} was trained on other data ({listed}); it goes on with --data={o.run.data}.'
    return (
        None
        if recorded
        else f'Note: {source} does not record its data; they are taken for {o.run.data}, which is recorded from now on.'
    )
