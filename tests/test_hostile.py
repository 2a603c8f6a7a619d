"""Files of strangers, by the hundred: every one ends well or in one clear error, soon and in little memory, and does nothing else."""

import random

import pytest
from hostile import CANARY, cases, examine

MOST_MB, MOST_SECONDS = 1000, 10


def assert_harmless(tmp_path, chosen):
    canary = tmp_path / 'outside'
    canary.mkdir()
    (canary / 'a.png').write_bytes(b'as it was')
    results = examine(tmp_path, chosen, timeout=1000)
    fine = ('well', 'one clear error')
    bad = [result for result in results if result['ended'] not in fine or result['seconds'] > MOST_SECONDS]
    assert not bad, bad[:5]
    assert sum(result['grew'] for result in results) < MOST_MB, max(
        results, key=lambda result: result['grew']
    )
    assert not list(tmp_path.rglob(CANARY)) and [
        (path.name, path.read_bytes()) for path in canary.iterdir()
    ] == [('a.png', b'as it was')]
    assert {path.name for path in tmp_path.iterdir()} <= {
        'files',
        'cases.json',
        'here',
        'outside',
        '.cache',
        '.config',
    }
    assert not list((tmp_path / 'here').iterdir())


@pytest.mark.parametrize('part', range(2))
def test_hostile_files_end_in_one_clear_error(tmp_path, part):
    """Of the table, every fifth file; all of them in the slow suite."""
    chosen = list(cases())[::5]
    assert len(chosen) > 200
    assert_harmless(tmp_path, chosen[part::2])


@pytest.mark.slow
def test_all_hostile_files_end_in_one_clear_error(tmp_path):
    chosen = list(cases())
    assert len(chosen) > 1000
    assert_harmless(tmp_path, chosen)


@pytest.mark.slow
def test_mutations_of_files_end_in_one_clear_error(tmp_path):
    """Bytes of good and of hostile files are changed, left out or repeated at random places."""
    rng, chosen = random.Random(0), []
    small = [
        (reader, name, content)
        for reader, name, content in cases()
        if isinstance(content, bytes) and len(content) < 100_000
    ]
    while len(chosen) < 4000:
        reader, name, content = rng.choice(small)
        content = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(content) + 1)
            content[at : at + rng.choice((0, 1, 1, 4))] = rng.choice(
                (rng.randbytes(1), b'\xff\xff\xff\x7f', b'', bytes(content[at : at + 20]) * 2)
            )
        chosen.append((reader, name, bytes(content)))
    assert_harmless(tmp_path, chosen)
