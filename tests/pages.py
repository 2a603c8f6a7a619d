"""The README and the pages of docs/: their blocks of code, and the commands in them."""

import re
import shlex
from typing import NamedTuple

from helpers import ROOT

from docs import generate_options

PAGES = sorted((ROOT / 'docs').glob('*.md'))
README = ROOT / 'README.md'
COMMANDS = {name: generate_options.command(name) for name in generate_options.COMMANDS}


class Call(NamedTuple):
    """A call of one of our scripts: the page, the words before the script, the command's name, its arguments."""

    page: str
    before: list[str]
    name: str
    arguments: list[str]


def blocks(page, language):
    """The fenced blocks of a page in a language, each with the `text` block that follows it directly, or None."""
    pattern = rf'^```{language}\n(.*?)^```\n(?:\n^```text\n(.*?)^```)?'
    return [(code, output or None) for code, output in re.findall(pattern, page.read_text(), re.M | re.S)]


def shell_blocks(page):
    """Blocks of commands, in order: fenced as `bash`, or indented by four spaces."""
    text = re.sub(r'^```(?!bash)\w+\n.*?^```$', '', page.read_text(), flags=re.M | re.S)
    pattern = r'^```bash\n(.*?)^```$|(?<=\n\n)((?:    [^\n]*\n+)+)'
    return [
        fenced or re.sub(r'^    ', '', indented, flags=re.M)
        for fenced, indented in re.findall(pattern, text, re.M | re.S)
    ]


def shell_lines(page):
    """The lines of commands, continued ones as one, without comments."""
    for block in shell_blocks(page):
        for line in block.replace('\\\n', ' ').splitlines():
            if line := re.sub(r'(^|\s)#\s.*', '', line).strip():
                yield line


def calls(page):
    """The calls of our scripts on a page, in order."""
    for line in shell_lines(page):
        called = sorted((name for name in COMMANDS if f'{name} ' in line), key=len, reverse=True)
        if called and ' | ' not in line:  # which shows alternatives
            before, _, arguments = line.partition(f'{called[0]} ')
            yield Call(page.name, shlex.split(before), called[0], shlex.split(arguments))


def value_of(option: str, arguments: list[str]) -> str | None:
    """What follows `option=` in a command's arguments."""
    return next((a.partition('=')[2] for a in arguments if a.startswith(f'{option}=')), None)
