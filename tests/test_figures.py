"""Figures appear whole or not at all, whatever the split and the training look like."""

import os
import pathlib

import cv2
import matplotlib
from matplotlib import pyplot
from matplotlib.figure import Figure
import numpy as np
import pytest

from ssn_jax.report import figures


def split(count=8, shape=(48, 40), defective=4):
    """Made-up images, masks, maps and scores of a test split; the first ones are defective."""
    rng = np.random.default_rng(0)
    labels = (np.arange(count) < defective).astype(int)
    masks = np.zeros((count, *shape), np.uint8)
    masks[labels > 0, 10:20, 30:] = 255
    maps = np.clip(0.3 * rng.random((count, *shape)) + 0.5 * (masks > 0), 0, 1)
    return {
        'images': rng.integers(0, 256, (count, *shape, 3), np.uint8),
        'masks': masks,
        'maps': maps.astype(np.float32),
        'scores': maps.max(axis=(1, 2)),
        'labels': labels,
        'names': [f'scratch/{i:03d}.png' for i in range(count)],
    }


def check(path, low=2_000, high=3_000_000):
    """The file decodes, is of a size fit for a page, shows something and is alone in its folder."""
    picture = cv2.imread(str(path))
    assert picture is not None
    assert 200 < min(picture.shape[:2]) <= max(picture.shape[:2]) < 4000
    assert picture.std() > 3
    assert low < path.stat().st_size < high
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    'data',
    [
        split(),
        split(count=1, defective=1),
        split(count=1, defective=0),
        split(defective=0),
        split(defective=8),
        split(shape=(64, 24)),
        split(shape=(24, 64)),
        split() | {'scores': np.full(8, np.nan), 'maps': np.full((8, 48, 40), np.nan)},
        split() | {'maps': np.full((8, 48, 40), 0.5)},
        split() | {'names': ['a very long folder name/and a very long file name.png' * 3] * 8},
        split() | {'evidence': True},
    ],
    ids=[
        *('usual', 'one defective', 'one normal', 'none defective', 'all defective', 'tall'),
        *('wide', 'not finite', 'constant maps', 'long names', 'evidence'),
    ],
)
def test_overlays(tmp_path, data):
    figures.overlays(tmp_path / 'overlays.png', **data, title='mod2 · screw (embedded data)')
    check(tmp_path / 'overlays.png')


def test_best_and_worst_by_hand():
    labels = np.array([1, 1, 1, 1, 0, 0, 0])
    scores = np.array([0.9, 0.2, 0.7, 0.4, 0.1, 0.8, 0.3])
    assert figures.pick_best_worst(scores, labels, 1) == ([0, 4], [1, 5])
    # The classes are shared out: two and two defective, two and one normal.
    assert figures.pick_best_worst(scores, labels, 5) == ([0, 2, 4, 6], [1, 3, 5])


def test_a_score_that_is_no_number_is_among_the_worst():
    scores, labels = np.array([0.9, np.nan, 0.1, np.nan]), np.array([1, 1, 0, 0])
    assert figures.pick_best_worst(scores, labels, 1) == ([0, 2], [1, 3])


def test_colours_of_evidence_do_not_hang_on_what_else_is_shown():
    image, maps = np.full((1, 4, 4, 3), 100, np.uint8), np.full((2, 4, 4), 0.5)
    alone, scale = figures._tint(image, maps[:1], True)
    maps[1] = 0.9
    beside, _ = figures._tint(image.repeat(2, 0), maps, True)
    assert (alone[0] == beside[0]).all() and scale.get_clim() == (0, 1)
    spanned, _ = figures._tint(image.repeat(2, 0), maps, False)
    assert (spanned[0] != beside[0]).any()


def test_compare_maps(tmp_path):
    data = split(3, defective=3)
    systems = {'GAP+CAM': data['maps'], 'SuperSimpleNet with every mask there is': 1 - data['maps']}
    kept = {name: data[name] for name in ('images', 'masks', 'names')}
    notes = {system: ['0.981 · defective'] * 3 for system in systems}
    figures.compare_maps(
        tmp_path / 'compare.png', systems=systems, title='ksdd2', notes=notes, **kept
    )
    check(tmp_path / 'compare.png')


@pytest.mark.parametrize('values', [[0.0015, 0.05, 0.1, 0.5], [0, 1], list(range(12)), [0.1]])
def test_accuracy_over_a_setting(tmp_path, values):
    lines = {name: [(v, 0.5, 0.1) for v in values] for name in ('mod2', 'mod2 · noise.z_dim=0')}
    for published in ({}, {'mod2': [(values[0], 0.7)]}):
        figures.over_setting(tmp_path / 'x.png', lines, published, 'screw', 'noise.beta')
        check(tmp_path / 'x.png')


@pytest.mark.parametrize(
    'history',
    [
        {'epoch': np.arange(5, 305), 'loss': np.geomspace(80, 0.01, 300), 'map': np.ones(300)},
        {'epoch': [1, 2, 3, 4], 'loss': [1.0, np.nan, np.inf, 2.0]},
        {'loss': [np.nan, np.nan]},
        {'loss': [0.5], 'generator': [-0.5]},
        {'epoch': [], 'loss': []},
        {f'loss {i}': [1.0, 2.0] for i in range(7)},
    ],
    ids=['usual', 'gaps', 'all nan', 'one epoch', 'no epoch', 'many'],
)
def test_loss_curves(tmp_path, history):
    figures.loss_curves(tmp_path / 'loss.png', history, 'mod2 · screw')
    check(tmp_path / 'loss.png')


def test_decision_figures(tmp_path):
    data = split()
    charts = {
        'pr': (figures.pr_curve, data['maps'], data['masks']),
        'roc': (figures.roc_curve, data['scores'], data['labels']),
        'scores': (figures.score_histogram, data['scores'], data['labels']),
        'one': (figures.score_histogram, data['scores'][:1], data['labels'][:1]),
        'nan': (figures.score_histogram, np.full(8, np.nan), data['labels']),
    }
    for name, (draw, scores, labels) in charts.items():
        draw(tmp_path / name / 'chart.png', scores, labels, 'test split')
        check(tmp_path / name / 'chart.png')
    path = tmp_path / 'threshold' / 'chart.png'
    figures.score_histogram(path, data['scores'], data['labels'], 'test split', threshold=0.5)
    check(path)


@pytest.mark.parametrize('draw', [figures.roc_curve, figures.pr_curve])
def test_curves_refuse_what_has_none(tmp_path, draw):
    with pytest.raises(ValueError, match='defect'):
        draw(tmp_path / 'curve.png', np.arange(4.0), np.zeros(4), 'no defects')
    with pytest.raises(ValueError, match='finite'):
        draw(tmp_path / 'curve.png', np.array([0.1, np.nan]), np.array([0, 1]), 'not finite')
    assert not os.listdir(tmp_path)


def test_nothing_is_left_half_written(tmp_path, monkeypatch):
    path = tmp_path / 'loss.png'
    path.write_text('the figure of yesterday')
    with pytest.raises(ValueError, match='shape'):  # fails while drawing
        figures.loss_curves(path, {'epoch': [1, 2, 3], 'loss': [1.0, 2.0]}, 'mod2')

    def full_disk(figure, draft, **_):
        pathlib.Path(draft).write_text('half')
        raise OSError('no space left on device')

    monkeypatch.setattr(Figure, 'savefig', full_disk)
    with pytest.raises(OSError, match='no space'):  # fails while writing
        figures.loss_curves(path, {'loss': [1.0]}, 'mod2')
    assert os.listdir(tmp_path) == ['loss.png']
    assert path.read_text() == 'the figure of yesterday'


def test_no_global_state_is_touched(tmp_path):
    before, data = dict(matplotlib.rcParams), split()
    figures.overlays(tmp_path / 'overlays.png', **data, title='mod2')
    figures.roc_curve(tmp_path / 'roc.png', data['scores'], data['labels'], 'mod2')
    figures.pr_curve(tmp_path / 'pr.png', data['maps'], data['masks'], 'mod2')
    assert dict(matplotlib.rcParams) == before
    assert not pyplot.get_fignums()
