"""Whether a resumed run is the run of its training state: same settings, same data."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import click

from dnnlib import EasyDict, UserError
from dnnlib.text import printable
from training.command_line import RUN, Options, change
from training.objectives import OBJECTIVES


def load_earlier(resume: str) -> tuple[str, dict]:
    """(path, contents) of the training state that --resume names, or the newest complete one in a folder."""
    from torch_utils import distributed
    from training import run_files

    # The main process reads it, skipping damaged ones, and sends it to the others: a file system would have to
    # deliver it many times.
    report = lambda line: click.echo(printable(line), err=True)
    return distributed.tensors_from_main(lambda: run_files.load_state(resume, report))


# fmt: off
# Settings, besides those of network and loss, that a resumed run must not change.
SETTINGS = ['objective', 'teacher_digest', 'guide_digest', 'guidance', 'guidance_interval', 'encoder',
            'batch_size', 'seed', 'augment', 'phema_stds', 'precision', 'optim']
# fmt: on
# Options of losses that it may: a rate like --lr, and what follows from the data, which are compared by themselves.
FREE = {'aux_lr', 'classes'}


# {name in a record: name of the option}
OPTION_OF = {option.key.rpartition('.')[2]: option.name for option in RUN.values() if option.key}


def check_same_run(o: Options, c: EasyDict, earlier: dict) -> None:
    """Raises: UserError, naming the setting, if the resumed run would be another run."""

    def settings(config):
        chosen, network = {name: config.get(name) for name in SETTINGS}, config['network']
        # An objective of one's own, which a state may name, need not be there any more.
        objective, loss = OBJECTIVES.get(config['objective']), config['loss']
        loss = objective.complete(loss) if objective else loss
        loss = {name: value for name, value in loss.items() if name not in FREE}
        return {**chosen, 'network': network['class_name'], **network['kwargs'], **loss}

    # Through JSON, as the stored ones went, which made lists of tuples.
    then, now = settings(earlier), settings(json.loads(json.dumps(c)))
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if not changed:
        return
    cure = 'Leave these options out, or add --resume-override'
    if 'teacher_digest' in changed:
        raise UserError(
            f'--resume={o.run.resume} was trained with the teacher {earlier.get("teacher")}, and '
            f'--teacher={o.teacher} is another network. Give that one, or add --resume-override'
        )
    if 'guide_digest' in changed:
        with_guide = lambda config: (
            f'with --guide={guide}' if (guide := config.get('guide')) else 'without --guide'
        )
        raise UserError(
            f'--resume={o.run.resume} was trained {with_guide(earlier)}, and now its teacher would be guided '
            f'otherwise, {with_guide(c)}. {cure}'
        )
    # Options of the loss have their own names, which others may have too.
    own = {*earlier['loss'], *c['loss']}
    named = {name: name if name in own else OPTION_OF.get(name, name) for name in changed}
    listed = ', '.join(change(option, then.get(name), now.get(name)) for name, option in named.items())
    raise UserError(f'--resume={o.run.resume} would be another run with {listed}. {cure}')


@contextlib.contextmanager
def as_stored(o: Options, name: str) -> Iterator[None]:
    """A block that reads the file of an option. Raises: UserError, which says if the resumed run has named it."""
    try:
        yield
    except UserError as error:
        if name not in o.stored:
            raise
        value = getattr(o.run, name, None) or getattr(o.own, name, None)
        raise UserError(
            f'{printable(error)} (--{name}={value} is stored in the run that --resume names: give its '
            f'present place by --{name}=PATH)'
        ) from error


def data_record(o: Options, dataset) -> EasyDict:
    """The training set as plain data: how it is opened, and what identifies it. Equal on all processes."""
    from torch_utils import distributed

    # Only the main process reads files for the digest.
    space, is_subset = dataset.label_space, dataset.num_images < dataset.num_files
    digest = distributed.broadcast_object(dataset.digest() if distributed.is_main() else None)
    return EasyDict(
        path=o.run.data,
        use_labels=o.run.cond,
        resolution=dataset.resolution,
        xflip=o.run.xflip,
        cache=dataset.caches,
        max_size=dataset.num_images if is_subset else None,
        num_images=dataset.num_images,
        image_shape=dataset.image_shape,
        label_dim=space.dim,
        **space.record(),
        digest=digest,
    )


# fmt: off
# Facts that identify data besides their digest: a text for both values, and the text of a value.
DATA_FACTS = dict(
    use_labels=('--cond={} then, --cond={} now', int),
    xflip=('xflip = {} then, {} now', json.dumps),
    max_size=('{} then, {} now', lambda value: 'all images' if value is None else f'--max-images={value}'),
    num_images=('{} images then, {} now', int),
    image_shape=('images of {} then, of {} now', '{0[2]}x{0[1]}x{0[0]}'.format),
    label_dim=('labels of length {} then, {} now', int),
    label_kind=('{} then, {} now', lambda value: value or 'no labels'),
    classes=('images of class {} then, {} now', lambda value: value or 'each'),
)
# fmt: on


def check_same_data(o: Options, now: dict, then: dict, source: str) -> str | None:
    """Compare the data of a resumed run. Returns: a line to print, or None.

    Args:
        now: `data_record` of these options.
        then: what `source`, a state or a folder, has recorded.
    Raises: UserError, which names what differs, unless --allow-other-data is given. If only --xflip differs,
        --resume-override allows it too.
    """
    # Older versions recorded only some of it, and had no --max-images.
    now, recorded = json.loads(json.dumps(now)), 'digest' in then
    words = {
        name: text.format(name_it(then.get(name)), name_it(now.get(name)))
        for name, (text, name_it) in DATA_FACTS.items()
        if (recorded or name in then or name == 'max_size') and then.get(name) != now.get(name)
    }
    if recorded and then['digest'] != now['digest'] and not words:
        words = {'digest': 'other names, sizes, contents or labels of files'}

    # Refuse other data, or allow them with a warning.
    listed, mirrored = '; '.join(words.values()), words.keys() == {'xflip'}
    if words and not (o.run.allow_other_data or (mirrored and o.run.resume_override)):
        cure = '--allow-other-data' + ' or --resume-override' * mirrored
        raise UserError(
            f'--resume={source} was trained on other data than --data={o.run.data}: {listed}. '
            f'Resume with the data it was made with, or add {cure}'
        )
    if words:
        return f'Warning: {source} was trained on other data ({listed}); it continues on --data={o.run.data}.'
    if not recorded:
        return f'Note: {source} does not record its data; it is assumed to be {o.run.data}, and recorded now.'
    return None
