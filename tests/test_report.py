"""Pictures and tables of reports."""

import numpy as np
import pytest
from PIL import Image

from experiments import report


@pytest.mark.parametrize('shape', [(4, 4), (4, 4, 3), (64, 64, 3)], ids=['gray', 'color', 'large'])
def test_a_grid_has_the_files_in_rows_with_a_line_after_each_enlarged_to_32_pixels(tmp_path, shape):
    """Small images eightfold, large ones as they are; a pixel of gray 96 on the right and below."""
    images = np.random.default_rng(0).integers(256, size=(6, *shape), dtype=np.uint8)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f'{i}.png')
    report.write_grid([str(tmp_path / f'{i}.png') for i in range(6)], str(tmp_path / 'grid.png'), columns=3)
    grid, size, times = np.asarray(Image.open(tmp_path / 'grid.png')), shape[0], max(32 // shape[0], 1)
    if size == 4:  # with its line an image has five pixels: 32 // 4 = 8
        assert grid.shape[:2] == (2 * 5 * 8, 3 * 5 * 8)
    grid = grid[times // 2 :: times, times // 2 :: times]
    assert grid.shape == (2 * (size + 1), 3 * (size + 1), *shape[2:])
    for i, pixels in enumerate(images):
        top, left = i // 3 * (size + 1), i % 3 * (size + 1)
        assert np.array_equal(grid[top : top + size, left : left + size], pixels)
        assert (grid[top + size, left : left + size + 1] == 96).all() and (
            grid[top : top + size, left + size] == 96
        ).all()


def test_tables_have_a_row_for_each_and_html_is_escaped():
    rows = [['a<b', 1], ['c', 2.5]]
    assert (
        report.markdown_table(['name', 'value'], rows)
        == '| name | value |\n| :-- | --: |\n| a<b | 1 |\n| c | 2.5 |\n'
    )
    assert report.html_table(['name', 'value'], rows) == (
        '<table><tr><th>name</th><th>value</th></tr><tr><td>a&lt;b</td><td>1</td></tr><tr><td>c</td><td>2.5</td></tr></table>'
    )
