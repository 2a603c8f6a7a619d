"""Write docs/options.md: `python -m docs.generate_options`. Without arguments, and in place.

Names, defaults and the first words of each line come from the commands themselves, the rest from option_notes.yml.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import click
import yaml

from dnnlib import cli

DOCS = Path(__file__).parent
# {title: module and attribute of a command}
COMMANDS = {
    'train.py': 'train:main',
    'generate.py': 'generate:main',
    'fid.py calc': 'fid:calc',
    'fid.py ref': 'fid:ref',
    'validation.py': 'validation:main',
    'search.py': 'search:main',
    'reconstruct_phema.py': 'reconstruct_phema:main',
    'dataset_tool.py': 'dataset_tool:main',
    'demo.py': 'demo:main',
    'compare.py': 'compare:main',
    'convert.py': 'convert:main',
    'convert.py info': 'convert:info',
    **{
        f'edit.py {name}': f'edit:main:{name}'
        for name in ('inpaint', 'colorize', 'superres', 'stroke', 'denoise', 'interpolate')
    },
    'python -m benchmarks': 'benchmarks.__main__:main',
    **{
        f'benchmarks/{name}.py': f'benchmarks.{name}:main'
        for name in (
            *(
                'step',
                'pieces',
                'memory',
                'precision',
                'sampling',
                'startup',
                'checkpoint',
                'state',
                'frechet',
            ),
            *('images', 'data', 'scaling', 'mutants'),
        )
    },
    'python -m metrics.small_detectors': 'metrics.small_detectors:main',
    'python -m experiments.curves': 'experiments.curves:main',
    'python -m experiments.solver_table': 'experiments.solver_table:main',
    'python -m experiments.guided_digits': 'experiments.guided_digits:main',
    'python -m experiments.evidence': 'experiments.evidence:main',
}


def command(name: str) -> click.Command:
    """The click command of a title."""
    module, attribute, *child = COMMANDS[name].split(':')
    found = getattr(importlib.import_module(module), attribute)
    return found.commands[child[0]] if child else found


def options_of(found: click.Command) -> list[click.Option]:
    """Its options, without those that are hidden."""
    return [p for p in found.params if isinstance(p, click.Option) and not p.hidden]


def flag(option: click.Option) -> str:
    """Its first long name."""
    return next(name for name in option.opts if name.startswith('--'))


def default(option: click.Option) -> str:
    """What the second column says."""
    if told := re.search(r'\[default: (.*)\]', option.help):
        return told[1]
    if option.required:
        return 'required'
    if option.secondary_opts:
        return 'on'
    if option.is_flag:
        return 'off'
    return str(option.default) if option.show_default else 'none'


def line(option: click.Option, note: str | None) -> str:
    """The row of an option."""
    names = ', '.join(f'`{name}`' for name in [*option.opts, *option.secondary_opts] if name.startswith('--'))
    words = re.sub(r'\s*\[default: .*\]', '', option.help)
    return f'| {names} | {default(option)} | {words}{" " + note if note else ""} |'


def section(name: str, notes: dict) -> list[str]:
    """The lines of a command."""
    known, lines, group = notes.get(name, {}), [f'## `{name}`', ''], None
    if 'intro' in known:
        lines += [known['intro'].replace('\n\n', '\n'), '']
    header = ['| option | default | |', '| :-- | :-- | :-- |']
    for i, option in enumerate(options_of(command(name))):
        heading = getattr(option, 'group', None)
        if heading and heading != group:
            lines += [*([''] if i else []), f'### {heading}', '', *header]
        elif not i:
            lines += header
        group = heading or group
        lines.append(line(option, known.get(flag(option), notes['shared'].get(flag(option)))))
    return [*lines, '']


def page() -> str:
    """The whole page."""
    notes = yaml.safe_load((DOCS / 'option_notes.yml').read_text())
    stray = [
        f'{name} {key}'
        for name, known in notes.items()
        if name not in ('page', 'shared')
        for key in known
        if key != 'intro' and key not in {flag(option) for option in options_of(command(name))}
    ]
    if stray:
        raise SystemExit(f'option_notes.yml has notes on what is not an option: {", ".join(stray)}')
    lines = ['# Options', '', notes['page'].strip(), '']
    for name in COMMANDS:
        lines += section(name, notes)
    return '\n'.join(lines).rstrip('\n') + '\n'


@click.command(cls=cli.Command)
def main():
    """Write docs/options.md, from the options that the commands declare and docs/option_notes.yml."""
    (DOCS / 'options.md').write_text(page())


if __name__ == '__main__':
    main()
