"""The command line of train.py: the options of each objective, --help, and the way to typed configurations.

Quick to import, without PyTorch.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import click

from dnnlib import cli, options
from dnnlib.options import options_of
from training import config_file, presets, stored_options
from training.config import IN_STEPS, RESUME_OR_TRANSFER, HalfLife, RunConfig
from training.objectives import OBJECTIVES, objectives_with
from training.objectives.options import EDM2_WIDTHS, Config, Objective

RUN = options_of(RunConfig)
OWN = {name: options_of(objective.config) for name, objective in OBJECTIVES.items()}
BEFORE_OWN = ('Main', 'Hyperparameters', 'Network')  # headings that --help has before an objective's own
ALL = {**RUN, **{name: option for own in OWN.values() for name, option in own.items()}}
OWN_FIRST = sorted(ALL, key=lambda name: name in RUN)  # options of objectives, then those of every run


@dataclass(frozen=True)
class Options:
    """The options of a command line.

    Attributes:
        run: options of every run; `run.objective` is the name of the objective.
        own: options of the objective.
        given: names of the options that were given, or stored, and have an effect.
        notes: lines to print about options that are ignored or changed.
        stored: names of the options whose values are those of the resumed run.
        stages: [sampling steps, optimizer steps] of each round of progressive distillation.
    """

    run: RunConfig
    own: Config
    given: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    stored: frozenset[str] = frozenset()
    stages: tuple | None = None

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.run.objective]

    @property
    def teacher(self) -> str | None:
        """The value of --teacher; None if the objective has no such option."""
        return getattr(self.own, 'teacher', None)

    def but(self, **changes) -> Options:
        """A copy with other values, each of the configuration that has a field of that name."""
        # A name is the objective's if its configuration has such a field, else the run's.
        own = {field.name for field in dataclasses.fields(self.own)}
        return dataclasses.replace(
            self,
            given=self.given | changes.keys(),
            run=dataclasses.replace(self.run, **{k: v for k, v in changes.items() if k not in own}),
            own=dataclasses.replace(self.own, **{k: v for k, v in changes.items() if k in own}),
        )


def choose(given: Mapping[str, object], stored: Mapping[str, object] | None = None) -> Options:
    """The configurations of the options that were given, {name: value}.

    Args:
        stored: those of the run that --resume names, which are the defaults.
    Raises: click.UsageError if they contradict each other, whatever is in the files that they name.
    """
    # Which objective, and which options count.
    kept, about = set(), []
    if stored:
        given, kept, about = over_stored(given, stored)
    name = objective_of(given)
    check_preset(given, name)
    values, effective, notes = leave_out_idle(given, name, kept)
    refuse_others(effective, name)

    # Build the two configurations, which check themselves, and check one against the other.
    own = {option: value for option, value in values.items() if option in OWN[name]}
    run = {option: value for option, value in values.items() if option not in own}
    chosen = Options(
        RunConfig(**{**run, 'objective': name}),
        OBJECTIVES[name].config.from_given(own),
        frozenset(effective),
        (*notes, *about),
        frozenset(kept),
    )
    check_together(chosen)
    return chosen


def objective_of(given: Mapping[str, object]) -> str:
    """The objective that --objective or --consistency names."""
    name, consistency = given.get('objective'), given.get('consistency')
    if consistency and name not in (None, 'mcd'):
        raise click.UsageError(
            f'--consistency=True means --objective=mcd, not {name}: leave one of them out.'
        )
    if consistency is False and name == 'mcd':
        raise click.UsageError('--consistency=False contradicts --objective=mcd: leave one of them out.')
    return name or ('mcd' if consistency else 'diffusion')


def check_preset(given: Mapping[str, object], objective: str) -> None:
    """Raises: click.UsageError if --preset is of another objective."""
    preset = presets.objective_of_presets(given['preset']) if given.get('preset') else None
    if preset not in (None, objective):
        raise click.UsageError(
            f'--preset={given["preset"]} is for --objective={preset}, and this is {objective}: leave one of '
            'them out.'
        )


def leave_out_idle(
    given: Mapping[str, object], objective: str, quiet: Collection[str] = ()
) -> tuple[dict[str, object], set[str], list[str]]:
    """Find options that other given options leave without an effect, and say so but of those in `quiet`.

    The loss keeps its values although it does not use them: states record them, and resuming compares them.
    Returns: values, names of the options with an effect, and a line for each option that idles others.
    """
    values, effective, notes = dict(given), set(given), []
    for switch, off in switches(given).items():
        # Each option is told once, with the first one that idles it.
        idle = [name for name in OWN_FIRST if name in effective and name in idle_with(switch, off)]
        if told := [name for name in idle if name not in quiet]:
            notes.append(f'{ALL[switch].spelled(off)}: ignoring {options.names(ALL[name] for name in told)}.')
        effective.difference_update(idle)
        values = {name: value for name, value in values.items() if name not in idle or name in OWN[objective]}
    return values, effective, notes


def switches(given: Mapping[str, object]) -> dict[str, object]:
    """The given options, {name: value}, that leave others without an effect."""
    # Groups that are switched off, --consistency, and values that idle others.
    found = {option.switch: False for option in RUN.values() if option.switch}
    if 'objective' not in given:
        found['consistency'] = False
    found |= dict(option.idle for option in ALL.values() if option.idle)
    return {name: off for name, off in found.items() if name in given and given[name] == off}


def idle_with(switch: str, off: object) -> set[str]:
    """The options that have no effect if the option `switch` is `off`."""
    if switch == 'consistency':
        return {name for own in OWN.values() for name in own} - {*OWN['diffusion']} | {
            'val_teacher',
            'val_pairs',
        }
    return {name for name, option in ALL.items() if option.switch == switch or option.idle == (switch, off)}


def refuse_others(names: Iterable[str], objective: str) -> None:
    """Raises: click.UsageError for an option of another objective."""
    for name in names:
        if name in RUN or name in OWN[objective]:
            continue
        having = objectives_with(name)
        raise click.UsageError(
            f'{ALL[name].flag} is for --objective={" or ".join(having)}, and this is {objective}.'
            + (' (--consistency=True means mcd.)' if 'mcd' in having else '')
        )


def check_together(o: Options) -> None:
    """Raises: click.UsageError if options of the run and of the objective contradict each other."""
    # The teacher.
    run, name, objective = o.run, o.run.objective, o.objective
    if objective.teacher and objective.needs_teacher and not o.teacher:
        kinds = dict(
            diffusion='the diffusion model to distill', consistency='the consistency model to go on from'
        )
        raise click.UsageError(f'--objective={name} needs --teacher=PKL, {kinds[objective.teacher]}.')

    # Guidance, and training without labels.
    if hasattr(o.own, 'guide'):
        o.own.check_guidance()
        if o.own.guide and not o.teacher:
            raise click.UsageError(f'--guide={o.own.guide} guides a --teacher: give one.')
    if getattr(o.own, 'label_dropout', 0) and not run.cond:
        raise click.UsageError(
            f'--label_dropout={o.own.label_dropout:g} needs --cond=1: without it there are no labels.'
        )

    # Options that need another one.
    for switch in dict.fromkeys(option.switch for option in RUN.values() if option.switch):
        stray = [option for name, option in RUN.items() if name in o.given and option.switch == switch]
        if stray and not getattr(run, switch):
            raise click.UsageError(f'{options.names(stray)} needs --{switch}=1.')
    for option in OWN[name].values():
        if option.name in o.given and option.needs:
            other, needed = option.needs
            if getattr(o.own, other) != needed:
                raise click.UsageError(
                    f'{option.flag} is for --{other}={needed}, not {getattr(o.own, other)}.'
                )

    # Preconditioning and noise levels.
    stray = [f'--{option}' for option in ('P_mean', 'P_std') if option in o.given]
    if stray and run.precond in ('vp', 've'):
        raise click.UsageError(
            f'{", ".join(stray)}: only teachers with --precond=edm, ict, ect, scd and sct are trained '
            'at log-normal noise levels.'
        )
    if objective.loss and not o.teacher and run.precond in ('vp', 've'):
        raise click.UsageError(
            f"--objective={name} wants EDM's preconditioning: leave --precond={run.precond} out."
        )

    # A difference of outputs that are nearly equal.
    if run.tf32 and getattr(o.own, 'jvp', None) == 'difference':
        raise click.UsageError(
            '--tf32 rounds outputs by 0.05 %, and --jvp=difference divides their differences by 0.2 %: use '
            '--jvp=forward, or leave --tf32 out.'
        )

    # Validation.
    S = getattr(o.own, 'S', None)
    if S is not None and name != 'pd' and run.val_steps not in (None, S):
        raise click.UsageError(
            f'--val_steps={run.val_steps}, but the student takes --S={S} steps: leave it out.'
        )
    stray = [RUN[f'val_{option}'] for option in VAL_ODE if getattr(run, f'val_{option}') not in (None, False)]
    if stray and objective.loss:
        raise click.UsageError(
            f'{options.names(stray)}: these are for --objective=diffusion, and {name} makes a model with a '
            'sampler of its own.'
        )
    if run.val_pairs and (objective.teacher != 'diffusion' or not o.teacher):
        why = 'goes on from a consistency model' if o.teacher else 'has no teacher'
        raise click.UsageError(
            f"--val_pairs={run.val_pairs} compares with a diffusion model's images, and --objective={name} "
            f'{why}.'
        )
    steps = run.val_steps or (1 if getattr(o.own, 'mid_t', None) is None else 2)
    if run.val_pairs and hasattr(o.own, 'mid_t') and S is None and steps > 1:
        raise click.UsageError(
            f'--val_pairs={run.val_pairs}: {name} draws noise between {steps} steps, so its images have no '
            'pairs. Add --val_steps=1.'
        )
    if run.val_teacher and not o.teacher:
        raise click.UsageError(f'--val_teacher=1 needs a teacher, and --objective={name} has none.')
    if name == 'pd':
        check_rounds(run)


def check_rounds(run: RunConfig) -> None:
    """Raises: click.UsageError for options that the rounds of progressive distillation choose themselves."""
    for given, cure in (
        (run.budget, '--budget is not for pd: a round lasts --stage_steps optimizer steps.'),
        (run.duration, '--duration is not for pd: a round lasts --stage_steps optimizer steps.'),
        (run.val_steps, '--val_steps is not for pd: each round has its own number of steps.'),
        (run.transfer, '--transfer is not for pd: each student starts from its teacher.'),
    ):
        if given is not None:
            raise click.UsageError(cure)
    if not run.snap:
        raise click.UsageError(
            "--snap=0 leaves no snapshot, and a round's last one is the next one's teacher."
        )


VAL_ODE = ('solver', 'order', 'afs', 'to_zero', 'disc', 'sigmas')

# ----------------------------------------------------------------------------
# Options on top of those of a resumed run.

# Options that replace stored ones, beside those of `DISPLACED`.
REPLACED = dict(
    N=['mu_schedule'],
    lr_schedule=['lr_decay'],
    precond=['P_mean', 'P_std'],
    val_ref=['val_ref_data'],
    val_ref_data=['val_ref'],
)
# Options that are not compared with stored ones: those of a start, and files, whose contents are compared.
UNCOMPARED = (
    *('outdir', 'nosubdir', 'desc', 'resume', 'take_lock', 'resume_override', 'allow_other_data', 'dry_run'),
    *('data', 'teacher', 'guide', 'val_overwrite', 'preset'),
)


def over_stored(
    given: Mapping[str, object], stored: Mapping[str, object]
) -> tuple[dict[str, object], set[str], list[str]]:
    """The options of a resumed run: those given, and the others as they are stored.

    Returns: values, names of those that are as stored, and lines that say what changes.
    """
    # The same by one name.
    given = dict(given)
    if given.keys() & {'objective', 'consistency'}:
        given['objective'] = objective_of(given)
        given.pop('consistency', None)
    if (fp16 := given.pop('fp16', None)) is not None and fp16 != (stored.get('precision') == 'fp16'):
        given.setdefault('precision', 'fp16' if fp16 else 'fp32')

    # Stored options, without those that an option on top replaces or leaves without an effect.
    objective = given.get('objective', stored['objective'])
    replaced = {other for name in given for other in (*REPLACED.get(name, ()), *DISPLACED.get(name, ()))}
    idle = {name for switch, off in switches(given).items() for name in idle_with(switch, off)}
    # A stored option whose need is no longer met was not given now, so it falls away without an error.
    lacks_need = lambda needs: needs is not None and given.get(needs[0], needs[1]) != needs[1]
    kept = {
        name
        for name in stored.keys() - given.keys() - replaced - idle
        if (name in RUN or name in OWN[objective]) and not lacks_need(ALL[name].needs)
    }

    # What changes. (Lengths in steps that are not stored are compared in images.)
    in_steps = IN_STEPS.keys() - stored.keys()
    changed = [
        change(name, stored.get(name), value)
        for name, value in given.items()
        if name not in (*UNCOMPARED, *in_steps) and value != stored.get(name)
    ]
    about = [f'Resuming with {", ".join(changed)}.'] if changed else []
    if (outdir := given.get('outdir')) and not is_place_of(outdir, stored['outdir']):
        about.append(f'--resume continues in {stored["outdir"]}: ignoring --outdir={outdir}.')
    return {**{name: stored[name] for name in kept}, **given}, kept, about


def change(name: str, then: object, now: object) -> str:
    """`lr 0.001 -> 8e-05`: an option's stored value and the one on top."""

    def text(value):
        # Half-lives are stored in images, and given in Mimg.
        if value is None:
            return 'none'
        mimg = name in ALL and isinstance(ALL[name].kind, HalfLife)
        return config_file.as_word(value / 1e6 if mimg else value)

    return f'{name} {text(then)} -> {text(now)}'


def is_place_of(outdir: str, run_dir: str) -> bool:
    """Whether --outdir is a run's folder, or the folder that it was numbered in."""
    run_dir = os.path.realpath(run_dir)
    return os.path.realpath(outdir) in (run_dir, os.path.dirname(run_dir))


def given_and_stored(ctx: click.Context) -> tuple[dict[str, object], dict[str, object] | None]:
    """The options of a command line and its --config, and those of the run that --resume names, {name: value}."""
    given, words = options.given_in(ctx), ctx.meta.get('stored')
    if words is None:
        return given, None
    # Required options were lent their stored values.
    lent = {
        name
        for name in ctx.meta['lent']
        if ctx.get_parameter_source(name) == click.core.ParameterSource.DEFAULT_MAP
    }
    return {name: value for name, value in given.items() if name not in lent}, typed(words)


def typed(words: Mapping[str, str]) -> dict[str, object]:
    """The values of options that are words as on a command line."""
    ctx, known = click.Context(command()), {p.name: p for p in command().params}
    return {name: known[name].type_cast_value(ctx, word) for name, word in words.items()}


def resume(given: Mapping[str, object], folder: str) -> Options:
    """The options of a command line that began a run which now goes on in its folder."""
    given = {name: value for name, value in given.items() if name not in ('transfer', 'budget')}
    return choose({**given, 'resume': folder}, typed(stored_options.read(folder, ALL)))


# ----------------------------------------------------------------------------
# Defaults in words.


def default_text(name: str, objective: str | None = None) -> str | None:
    """The default of an option in --help: of one objective, or of all, as `base; mcd value; edm2 value`."""
    having = [objective] if objective else [key for key in OBJECTIVES if name in RUN or name in OWN[key]]
    # As one objective declares it; the others differ in defaults only.
    option = (OWN[having[0]] if name not in RUN else RUN)[name]
    if option.kind == options.FLAG or (not objective and ';' in (option.default_text or '')):
        return option.default_text

    # For EDM's networks.
    plain = {key: default_of(name, key) for key in having}
    known = [value for value in plain.values() if value is not None]
    # The base: the text, diffusion's default, or the most frequent one.
    base = option.default_text or plain.get('diffusion') or max(known, key=known.count, default=None)
    if objective and known:
        base = known[0]
    text = options.grouped({key: value for key, value in plain.items() if value is not None}, base)

    # For EDM2's networks, if that differs.
    large = {key: value for key in having if (value := edm2_default_of(name, key)) not in (None, plain[key])}
    # One value for all objectives needs no list of them.
    if len({str(value) for value in large.values()}) == 1 and large.keys() == plain.keys():
        text += f'; edm2 {options.value_text(large[having[0]])}'
    elif large:
        text += f'; edm2: {options.grouped(large, None).removeprefix("none; ")}'
    if text == 'none':
        return None
    less = f'{";" if ";" in text else ","} less in shorter runs' if option.scales and text != '0' else ''
    return text + less


def default_of(name: str, objective: str) -> object:
    """The default of an option, in its unit, for an objective and EDM's networks."""
    option = OWN[objective].get(name) or RUN[name]
    value = OBJECTIVES[objective].defaults.get(name, option.default)
    if option.kind == options.SWITCH and value is not None:
        return 'on' if value else 'off'
    return value / 1e6 if isinstance(option.kind, HalfLife) else value


def edm2_default_of(name: str, objective: str) -> object:
    """The default of an option for an objective and EDM2's networks; None if they have none of their own."""
    known = OBJECTIVES[objective]
    sizes = known.edm2_sizes.get(EDM2_WIDTHS['S'], {})
    if name in sizes:
        return f'by size, S {options.value_text(sizes[name])}'
    value = known.edm2.get(name)
    latents = known.edm2_latents.get(name)
    return (
        value if latents is None else f'{options.value_text(value)} (latents {options.value_text(latents)})'
    )


def parameters(objective: str | None = None) -> list[cli.Option]:
    """The options of the command: all, or those of one objective with its defaults."""
    # The objective's own options stand between the first and the last groups of every run.
    own = ALL if objective is None else {**RUN, **OWN[objective]}
    strangers = [option for name, option in own.items() if name not in RUN]
    by_heading = {
        heading: [o for o in strangers if o.heading == heading] for heading in (o.heading for o in strangers)
    }
    before = [option for option in RUN.values() if option.heading in BEFORE_OWN]
    after = [option for option in RUN.values() if option.heading not in BEFORE_OWN]
    ordered = [*before, *(option for group in by_heading.values() for option in group), *after]
    return [option.parameter(default_text(option.name, objective)) for option in ordered]


# ----------------------------------------------------------------------------
# The command.


class TrainCommand(cli.Command):
    """A command whose --help shows the options of the objective given with it; --help-all shows all."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = dict(type=cli.PATH, metavar='FILE', is_eager=True, expose_value=False, group='Main')
        everything = dict(is_flag=True, is_eager=True, expose_value=False, group='Main')
        # The command's own options, then those of runs and objectives.
        self.params += [
            cli.Option(['--config'], callback=read_config, help=CONFIG_HELP, **config),
            cli.Option(
                ['--help-all'],
                callback=show_all,
                help='Show the options of all objectives and exit.',
                **everything,
            ),
            cli.Option(
                ['--list-presets'],
                callback=list_presets,
                help='List the presets, their papers, figures and options, and exit.',
                **everything,
            ),
            *parameters(),
        ]
        # Before the options to which it gives values.
        preset = next(parameter for parameter in self.params if parameter.name == 'preset')
        preset.is_eager, preset.callback = True, read_preset
        # After --config, which may name the run.
        resume = next(p for p in self.params if p.name == 'resume')
        resume.is_eager, resume.callback = True, read_stored

    def parse_args(self, ctx, args):
        # --help ends parsing before the objective is known, so it looks at the words themselves.
        ctx.meta['words'] = list(args)
        rest = super().parse_args(ctx, args)
        displace(ctx)
        return rest

    def format_options(self, ctx, formatter):
        if ctx.meta.get('all'):
            super().format_options(ctx, formatter)
            return
        of_file = (ctx.default_map or {}).get('objective')
        objective = objective_in(ctx.meta.get('words', [])) or of_file
        shown = [p for p in self.params if p.name in ('config', 'help_all', 'list_presets')]
        self.format_groups(ctx, formatter, [*shown, *parameters(objective or 'diffusion')])
        if objective is None:
            with formatter.section('Options of an objective, which --objective=NAME --help describes'):
                formatter.write_dl([(name, options.names(own.values())) for name, own in OWN.items()])


CONFIG_HELP = (
    'Options from a YAML or JSON file: {option: value}, or a training_options.json or the output of '
    '--dry-run, whose run is repeated. Options on the command line take precedence.'
)


def objective_in(words: list[str]) -> str | None:
    """The objective that a command line names, which may otherwise be incomplete or wrong."""
    given = {}
    # Both forms: --option=value, and --option value.
    for option in ('objective', 'consistency'):
        for i, word in enumerate(words):
            if word.startswith(f'--{option}='):
                given[option] = word.partition('=')[2]
            elif word == f'--{option}' and i + 1 < len(words):
                given[option] = words[i + 1]
    if given.get('objective') in OBJECTIVES:
        return given['objective']
    return 'mcd' if given.get('consistency', '').lower() in ('true', '1', 'yes', 'on', 't', 'y') else None


def show_all(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Callback of --help-all."""
    if value:
        ctx.meta['all'] = True
        click.echo(ctx.get_help())
        ctx.exit()


def read_stored(ctx: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """Callback of --resume: the options of the run are kept for `choose`, and required ones need no repeating."""
    if path is not None and not ctx.resilient_parsing:
        if any(word.partition('=')[0] == '--transfer' for word in ctx.meta.get('words', [])):
            raise click.UsageError(RESUME_OR_TRANSFER)  # before the state is looked for
        ctx.meta['stored'] = words = stored_options.read(path, ALL)
        of_file = ctx.default_map or {}
        lent = {name: words[name] for name in ('outdir', 'data') if name not in of_file}
        ctx.default_map = {**of_file, **lent}
        ctx.meta['lent'] = lent.keys()
    return path


def read_config(ctx: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """Callback of --config: the file's values become the defaults."""
    if path is not None:
        of_file = config_file.read(path, ALL)
        ctx.default_map = {**(ctx.default_map or {}), **of_file}
        ctx.meta['lent'] = set(ctx.meta.get('lent', ())) - of_file.keys()


def read_preset(ctx: click.Context, parameter: click.Parameter, names: str | None) -> str | None:
    """Callback of --preset: its options become the defaults, after those of --config."""
    if names is not None:
        # Values of --config take precedence over those of a preset.
        values = config_file.from_options(presets.options_of_presets(names), ALL)
        ctx.default_map = {**values, **(ctx.default_map or {})}
    return names


def list_presets(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Callback of --list-presets."""
    if value:
        click.echo(presets.table(as_given))
        ctx.exit()


def as_given(name: str, value: object) -> str:
    """An option with a value, as on the command line."""
    option = ALL[name]
    if option.kind in (options.SWITCH, options.FLAG):
        return option.spelled(value)
    return f'{option.flag}={config_file.as_word(value)}'


# An option of the command line displaces these of --config and --preset, which say the same or exclude it.
DISPLACED = dict(
    T_anneal_kimg=['T_anneal_steps'],
    T_anneal_steps=['T_anneal_kimg'],
    fp16=['precision'],
    precision=['fp16'],
    resume=['transfer'],
    budget=['duration'],
    duration=['budget'],
    S=['val_steps'],
    N=['s0', 's1', 'schedule_steps'],
    s0=['N'],
    s1=['N'],
    schedule_steps=['N'],
)


def displace(ctx: click.Context) -> None:
    """Drop the values of --config and --preset that an option of the command line displaces."""
    source, sources = ctx.get_parameter_source, click.core.ParameterSource
    for given, others in DISPLACED.items():
        for other in others:
            # An option displaces what a file says; two on the command line are refused elsewhere.
            if source(given) == sources.COMMANDLINE and source(other) == sources.DEFAULT_MAP:
                ctx.params[other] = None
                ctx.set_parameter_source(other, sources.DEFAULT)


@functools.cache
def command() -> TrainCommand:
    """The command of train.py, which only parses options."""
    return TrainCommand('train.py', callback=lambda **_: None)


def parse(words: Iterable[str]) -> Options:
    """The options of a command line, as a list of words. Raises: click.UsageError."""
    return choose(*given_and_stored(command().make_context('train.py', list(words))))
