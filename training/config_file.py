"""Options from a file, for --config: a mapping of options, or a recorded configuration to be repeated.

A recorded configuration is what --dry-run prints and training_options.json holds. It names data, teacher and
all numbers, so it repeats a run from the beginning in a new folder.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping

from dnnlib import UserError, cli, limits, options, schema
from dnnlib.options import Option
from dnnlib.text import printable
from training import architectures
from training.config import COUNTED_IN_IMAGES
from training.saved_files import OPTIONS

# A new run resumes nothing; the objective is read separately; a preset's options are all recorded.
NOT_REPEATED = ('resume', 'objective', 'preset')


def read(path: str, known: Mapping[str, Option]) -> dict[str, str]:
    """The options of a file, or of the one in a run folder, {name: value as on a command line}.

    Raises: UserError for anything else.
    """
    if os.path.isdir(path):
        path = os.path.join(path, OPTIONS)
    try:
        with limits.open_regular(path) as file:
            data = limits.read_at_most(file, limits.JSON_FILE, 'a configuration')
        values = parse(data.decode())
        if not isinstance(values, dict):
            raise ValueError('is not a mapping of options')
        # A recorded configuration is known by its entries.
        if {'loss', 'network', 'dataset', 'total_nimg'} <= values.keys():
            return from_record(values, known)
        return from_options(values, known)
    except OSError as error:
        raise UserError(f'--config={path} cannot be read: {error.strerror or error}') from error
    except UnicodeDecodeError as error:
        raise UserError(f'--config={path}: it is no text, and a configuration is YAML or JSON.') from error
    # Whatever a file that is no configuration may cause.
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise UserError(f'--config={path}: it {printable(error, 400)}.') from error


def parse(text: str) -> object:
    """The value of JSON, recognized by the quotes of its first name, or else of YAML."""
    if re.match(r'\s*\{\s*["}]', text):
        return schema.parse_json(text, limits.JSON_FILE, 'a configuration')
    import yaml

    limits.check_size(len(text), limits.YAML_FILE, 'a configuration in YAML')
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f'is neither YAML nor JSON ({" ".join(str(error).split())})') from error


def from_options(values: Mapping, known: Mapping[str, Option]) -> dict[str, str]:
    """Options by name, with or without dashes before and in the names."""
    # By flag, and by name.
    names = {cli.underscored(option.flag.removeprefix('--')): option for option in known.values()} | known
    found = {}
    for key, value in values.items():
        name = cli.underscored(str(key).removeprefix('--'))
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            raise ValueError(f'has {key}, which is not an option' + (f'; {close[0]} is one' if close else ''))
        if value is not None and names[name].name in found:
            raise ValueError(f'has {names[name].flag} twice, by two names')
        if value is not None:
            found[names[name].name] = as_word(value)
    return found


def as_word(value: object) -> str:
    """A scalar or a list of scalars as on a command line. (Nested lists in YAML could be endless aliases.)"""
    if isinstance(value, list) and not any(isinstance(item, list) for item in value):
        return ','.join(map(as_word, value)) or 'none'
    if isinstance(value, (str, bool, int, float)):
        return str(value)
    raise ValueError('has a value that is not text, a number, a truth value or list of these')


def from_record(c: Mapping, known: Mapping[str, Option]) -> dict[str, str]:
    """The options that repeat the run of a recorded configuration."""
    values = recorded_options(c, known)
    if (stages := c.get('stages')) and c['loss']['S'] != stages[0][0]:
        raise ValueError(
            f'is of the round of {c["loss"]["S"]} steps, whose teacher an earlier round made: take that of '
            f'{stages[0][0]} steps'
        )

    # Options that stand for several entries, or exclude others.
    if not c.get('teacher'):  # else the teacher brings its network
        values['arch'], values['precond'] = architectures.name_of(
            c['network']['class_name'], c['network']['kwargs']
        )
    if values.get('N') is not None:  # a constant grid
        for name in ('s0', 's1', 'schedule_steps', 'mu_schedule'):
            values.pop(name, None)

    # Options without a value, without the option that they need, or without an effect, but for what the loss keeps.
    allowed = lambda needs: not needs or values.get(needs[0]) == needs[1]
    idle = lambda name, when: when and values.get(when[0]) == when[1] and name not in c['loss']
    values = {
        name: value
        for name, value in values.items()
        if value is not None and allowed(known[name].needs) and not idle(name, known[name].idle)
    }
    values['ema'] = divided(values['ema'], 1e6)  # in Mimg on the command line
    return {name: as_word(value) for name, value in values.items()}


def recorded_options(c: Mapping, known: Mapping[str, Option]) -> dict[str, object]:
    """The options, {name: value}, of a recorded configuration, maybe of an older version.

    None: not recorded, or not used.
    """
    # Options that are recorded as they are or in another unit.
    loss, batch, stages = c['loss'], c['batch_size'], c.get('stages')
    values = {
        name: in_option_unit(option, options.at(c, option.key))
        for name, option in known.items()
        if option.key and name not in NOT_REPEATED
    }
    own = {**loss, **(c.get('sampling') or {})}

    # Options that are recorded in another form.
    values |= {name: value for name, value in own.items() if name in known}
    values |= dict(
        objective=c['objective'],
        beta1=c['betas'][0],
        beta2=c['betas'][1],
        ema_rampup=c['ema_rampup_ratio'] or 0.0,
    )
    values['ls'] = 'dynamic' if c.get('loss_scaling', 1) is None else c.get('loss_scaling')
    values['lr_decay'] = round(c['lr_ref_nimg'] / batch) or None
    if c.get('teacher'):
        values |= dict.fromkeys(('cbase', 'cres', 'num_blocks', 'attn_resolutions'))

    # Lengths.
    for option, recorded in COUNTED_IN_IMAGES.items():
        values[option] = loss[recorded] // batch if loss.get(recorded) is not None else None
    if stages:
        # Rounds of one or two sampling steps are twice as long.
        (values['S_start'], steps), (values['S'], _) = stages[0], stages[-1]
        values['stage_steps'] = steps // 2 if values['S_start'] <= 2 else steps
    else:
        values['duration'] = divided(c['total_nimg'], 1e6)

    # Groups that a switch turns on.
    if validation := c.get('validation'):
        values |= dict(val=True, val_emas=validation.get('emas'))
    if wandb := c.get('wandb'):
        values |= dict(wandb=True, wandb_tags=wandb.get('tags') or None)
    return values


def in_option_unit(option: Option, value: object) -> object:
    """A recorded value in the unit of its option."""
    if value is None:
        return None
    return value if option.unit == 1 else divided(value, option.unit)


def divided(value: float, unit: float) -> float:
    """The number whose product with `unit` is `value` to the last bit, if there is one."""
    near = value / unit
    # The quotient may miss it by one unit in the last place, so its neighbors are tried.
    tries = (near, math.nextafter(near, math.inf), math.nextafter(near, 0))
    return next((x for x in tries if x * unit == value), near)
