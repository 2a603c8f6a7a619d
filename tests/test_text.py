"""Text of strangers in messages: one line, without anything that a terminal obeys."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnnlib import UserError
from dnnlib.text import printable
from dnnlib.util import named


@pytest.mark.parametrize(
    'text, shown',
    [
        ('a\nError: all is well', r'a\nError: all is well'),
        ('\x1b[2J\x1b[31mred', r'\x1b[2J\x1b[31mred'),
        ('a\rb\tc\0', r'a\rb\tc\x00'),
        ('gpj.\u202eexe', r'gpj.\u202eexe'),
        ('half \udcff', r'half \udcff'),
        ('\u2028line', r'\u2028line'),
        ('\x9b31m', r'\x9b31m'),
        ('Straße 日本 é ñ 😀', 'Straße 日本 é ñ 😀'),
        ('', ''),
    ],
)
def test_what_is_no_visible_character_is_escaped_and_everything_else_stays(text, shown):
    assert printable(text) == shown
    assert str(UserError(text)) == shown


@given(st.text(st.characters(codec=None)))
def test_whatever_a_text_is_a_terminal_shows_it_as_one_line(text):
    shown = printable(text)
    assert shown.isprintable() and (shown == text) == (text.isprintable() and len(text) <= 1000)


def test_long_texts_are_cut_off_and_say_so():
    assert printable('x' * 1500, 1000) == 'x' * 1000 + '... (500 characters more)'
    assert len(str(UserError('\n' * 10**7))) < 10_000


def test_an_error_has_a_second_line_only_where_the_program_gives_it_one():
    assert str(UserError('a\n       b', more='c\n       d')) == 'a\\n       b\n       c\\n       d'


def test_an_error_of_several_lines_keeps_them_between_processes_and_behind_options():
    error = UserError('one\nline', 'two', more='three')
    assert str(error) == 'one\\nline\n       two\n       three' == str(pickle.loads(pickle.dumps(error)))
    with pytest.raises(UserError) as raised, named('--ref'):
        raise error
    assert str(raised.value) == f'--ref: {error}'
