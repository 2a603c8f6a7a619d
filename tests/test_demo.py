"""`make demo`: every command runs and every file is there."""

import json

from helpers import assert_one_clear_error, invoke

import demo


def test_the_demo_tells_its_story(tmp_path, forked_commands):
    """As little training as it can have: every command runs and every file is there; the numbers mean nothing."""
    out = tmp_path / 'out'
    done = invoke(demo.main, f'--outdir={out}', '--scale=0.001')
    assert done.exit_code == 0, done.output
    rows = json.loads((out / 'results.json').read_text())
    assert [(r['model'], r['solver'], r['nfe']) for r in rows] == [
        ('teacher', 'euler', 8),
        ('teacher', 'heun', 511),
        ('student-8', 'student', 8),
        ('student-4', 'student', 4),
        ('student-2', 'student', 2),
        ('direct-8', 'student', 8),
        ('direct-2', 'student', 2),
        ('direct-1', 'student', 1),
    ]
    for row in rows:
        assert (
            row['images'] == 64
            and row['seconds'] > 0
            and row['interval'][0] <= row['distance'] <= row['interval'][1]
        )
        assert row['distance_pca'] > 0 and row['distance_random'] > 0
    page = (out / 'report.html').read_text()
    assert (
        page.count('data:image/png;base64,') == 10
        and 'train.py' in page
        and 'http' not in page
        and 'not FID' in page
    )
    assert (out / 'table.md').read_text().count('\n') == 10 and (out / 'table.md').read_text() in done.stdout
    assert {'loss.png', 'distance.png', 'samples.png', 'samples-student-8.png'} <= {
        path.name for path in out.iterdir()
    }
    shown = [line for line in done.stdout.splitlines() if line.startswith('$ python ')]
    assert len(shown) == 2 + 3 + 7 + 8 * 4
    assert_one_clear_error(invoke(demo.main, f'--outdir={out}'), 'not empty')
