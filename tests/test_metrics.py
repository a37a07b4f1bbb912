"""Metrics against closed forms, scikit-learn, brute force and the reference file."""

import pathlib
import time

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest
from skimage import measure
from sklearn import metrics as sklearn_metrics

from ssn_jax import metrics

REFERENCE = pathlib.Path(__file__).parent / 'reference' / 'pixel_metrics.npz'


def split(seed=0, shape=(6, 16, 16), levels=None):
    """A random test split of N images; `levels` coarsens all scores to make ties."""
    rng = np.random.default_rng(seed)
    masks = np.zeros(shape, np.uint8)
    labels = np.arange(shape[0]) % 2
    for i in np.flatnonzero(labels):
        y, x = rng.integers(0, shape[1] - 4, 2)
        masks[i, y : y + 3, x : x + 4] = 255
        masks[i, 0, 0] = 1
    maps = rng.standard_normal(shape).astype(np.float32) + (masks > 0)
    scores = rng.standard_normal(shape[0]).astype(np.float32) + labels
    if levels:
        maps, scores = np.round(maps * levels) / levels, np.round(scores * levels) / levels
    return {
        'scores': scores,
        'maps': maps,
        'labels': labels,
        'masks': masks,
        'has_mask': np.ones(shape[0], bool),
    }


def brute_aupro(maps, masks, limit):
    """AUPRO by visiting every threshold and walking along the curve."""
    regions, normal = [], np.concatenate([m[k == 0] for m, k in zip(maps, masks, strict=True)])
    for scores, mask in zip(maps, masks, strict=True):
        labelled = measure.label(mask > 0, connectivity=2)
        regions += [scores[labelled == k] for k in range(1, labelled.max() + 1)]
    thresholds = np.unique(np.concatenate([scores.ravel() for scores in maps]))[::-1]
    fpr = [0.0, *(np.mean(normal >= t) for t in thresholds)]
    pro = [0.0, *(np.mean([np.mean(r >= t) for r in regions]) for t in thresholds)]
    inside = [f for f in fpr if f <= limit]
    last = np.interp(limit, fpr, pro) if inside[-1] < limit else pro[len(inside) - 1]
    return np.trapezoid([*pro[: len(inside)], last], [*inside, limit]) / limit


def test_image_metrics_by_hand():
    # Defects at 4, 2 and 1; a normal image at 3, another ties with the defect at 2.
    scores, labels = np.array([4, 3, 2, 2, 1.0]), np.array([1, 0, 1, 0, 1])
    ranking = metrics.rank(scores, labels > 0)
    # Won pairs: 2 of the first, 1/2 of the second, none of the third.
    assert metrics.auroc(ranking) == pytest.approx(2.5 / 6)
    assert metrics.average_precision(ranking) == pytest.approx((1 / 1 + 2 / 4 + 3 / 5) / 3)


def test_aupro_by_hand():
    maps = np.array([[[9, 0, 7, 5], [0, 0, 0, 6], [0, 8, 0, 0], [0, 0, 0, 0]]], float)
    masks = np.zeros((1, 4, 4), bool)
    masks[0, 0, 0] = True  # found first, with no false positive
    masks[0, 0, 3] = masks[0, 1, 3] = True  # its halves found after two of the 13 normal pixels
    regions = metrics.label_regions(masks)
    assert regions.tolist() == [1, 2, 2]
    # At a limit of 4 normal pixels the first region covers all of it, the second its latter half.
    value = metrics.aupro(metrics.rank(maps, masks), regions, limit=4 / 13)
    assert value == pytest.approx((1 + 1 / 2) / 2)


def test_aupro_cuts_a_tie_where_the_limit_falls():
    # The defect ties with all 10 normal pixels: its curve is the diagonal, (0.3 ** 2 / 2) / 0.3.
    maps, masks = np.zeros((1, 1, 11)), np.eye(1, 11, dtype=bool)[None]
    value = metrics.aupro(metrics.rank(maps, masks), metrics.label_regions(masks), limit=0.3)
    assert value == pytest.approx(0.15)


def test_regions_touch_at_corners_but_not_across_images():
    masks = np.zeros((3, 4, 4), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 3, 3] = True
    masks[2, 0, 0] = True
    assert metrics.label_regions(masks).tolist() == [1, 1, 2, 3]


@pytest.mark.parametrize('levels', [None, 2, 0.5])
@pytest.mark.parametrize('seed', range(3))
def test_equals_sklearn_and_brute_force(seed, levels):
    data = split(seed, levels=levels)
    values, reasons = metrics.evaluate(**data)
    labels, masks = data['labels'], data['masks'].ravel() > 0
    pixels, peaks = data['maps'].ravel(), data['maps'].max(axis=(1, 2))
    auroc, ap = sklearn_metrics.roc_auc_score, sklearn_metrics.average_precision_score
    assert not reasons
    assert tuple(values) == metrics.METRICS
    expected = {
        'I-AUROC': auroc(labels, data['scores']),
        'AP-det': ap(labels, data['scores']),
        'P-AUROC': auroc(masks, pixels),
        'AUPRO': brute_aupro(data['maps'], data['masks'], 0.3),
        'AP-loc': ap(masks, pixels),
        'seg-I-AUROC': auroc(labels, peaks),
        'seg-AP-det': ap(labels, peaks),
    }
    assert values == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize('limit', [0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize('levels', [None, 2])
def test_aupro_equals_brute_force_at_any_limit(levels, limit):
    data = split(3, shape=(3, 8, 8), levels=levels)
    masks = data['masks'] > 0
    ranking = metrics.rank(data['maps'], masks)
    value = metrics.aupro(ranking, metrics.label_regions(masks), limit)
    assert value == pytest.approx(brute_aupro(data['maps'], masks, limit), abs=1e-9)


@pytest.mark.parametrize('name', ['score', 'ties'])
def test_equals_reference(name):
    reference = np.load(REFERENCE)
    masks = reference['mask'] > 0
    ranking = metrics.rank(reference[name], masks)
    assert metrics.auroc(ranking) == pytest.approx(reference[f'pauroc_{name}'], abs=1e-6)
    assert metrics.average_precision(ranking) == pytest.approx(reference[f'ap_{name}'], abs=1e-6)
    # The file's AUPRO restarts the numbers of the regions in every image and so counts the k-th
    # regions of all images as one; the definition, and `label_regions`, keep them apart.
    merged = np.concatenate([measure.label(mask, connectivity=2)[mask] for mask in masks])
    for limit in (0.3, 0.05):
        expected = reference[f'aupro_{name}_{limit}']
        assert metrics.aupro(ranking, merged, limit) == pytest.approx(expected, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 1, 4]))
def test_invariant_to_order_and_to_monotone_transforms(seed, levels):
    data = split(seed, shape=(5, 8, 8), levels=levels)
    values, _ = metrics.evaluate(**data)

    order = np.random.default_rng(seed).permutation(5)
    shuffled, _ = metrics.evaluate(**{name: x[order] for name, x in data.items()})
    assert shuffled == pytest.approx(values, abs=1e-12)

    # Doubling is exact in floating point, so no tie is made or broken.
    stretched = data | {'scores': 2 * data['scores'], 'maps': 4 * data['maps']}
    assert metrics.evaluate(**stretched)[0] == values

    turned, _ = metrics.evaluate(**data | {'scores': -data['scores'], 'maps': -data['maps']})
    for name in ('I-AUROC', 'P-AUROC'):
        assert turned[name] == pytest.approx(1 - values[name], abs=1e-12)


def test_perfect_and_inverted_prediction():
    data = split()
    perfect = data | {'scores': data['labels'], 'maps': data['masks'] > 0}
    assert metrics.evaluate(**perfect)[0] == pytest.approx(dict.fromkeys(metrics.METRICS, 1.0))
    inverted = {name: -1.0 * perfect[name] for name in ('scores', 'maps')}
    values, _ = metrics.evaluate(**data | inverted)
    assert [values[name] for name in ('I-AUROC', 'P-AUROC', 'AUPRO')] == [0, 0, 0]


def test_images_without_a_mask_do_not_count_for_the_pixels():
    data = split()
    known = np.array([1, 1, 1, 0, 1, 1], bool)
    values, _ = metrics.evaluate(**data | {'has_mask': known})
    kept, _ = metrics.evaluate(**{name: x[known] for name, x in data.items()})
    everything, _ = metrics.evaluate(**data)
    for name in ('P-AUROC', 'AUPRO', 'AP-loc'):
        assert values[name] == kept[name] != everything[name]
    for name in ('I-AUROC', 'seg-AP-det'):
        assert values[name] == everything[name]


IMAGE_METRICS = {'I-AUROC', 'AP-det', 'seg-I-AUROC', 'seg-AP-det'}
PIXEL_METRICS = {'P-AUROC', 'AUPRO', 'AP-loc'}


@pytest.mark.parametrize(
    ('change', 'undefined', 'reason'),
    [
        ({'labels': np.ones(6)}, IMAGE_METRICS, 'no normal image'),
        ({'labels': np.zeros(6)}, IMAGE_METRICS, 'no defective image'),
        ({'has_mask': np.zeros(6)}, PIXEL_METRICS, 'no defective image has a mask'),
        ({'masks': np.zeros((6, 16, 16))}, PIXEL_METRICS, 'no defective image has a mask'),
        ({'masks': np.ones((6, 16, 16))}, PIXEL_METRICS, 'no normal pixel'),
        ({'scores': np.full(6, np.nan)}, {'I-AUROC', 'AP-det'}, 'non-finite scores'),
        (
            {'maps': np.full((6, 16, 16), np.inf)},
            PIXEL_METRICS | {'seg-I-AUROC', 'seg-AP-det'},
            'non-finite maps',
        ),
    ],
)
def test_undefined_metrics_are_none_with_a_reason(change, undefined, reason):
    values, reasons = metrics.evaluate(**split() | change)
    assert reasons == dict.fromkeys(undefined, reason)
    assert {name for name, value in values.items() if value is None} == undefined


def test_no_image_at_all():
    values, reasons = metrics.evaluate(**{name: x[:0] for name, x in split().items()})
    assert set(values.values()) == {None}
    assert set(reasons) == set(metrics.METRICS)


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r'masks \(6, 8, 8\)'):
        metrics.evaluate(**split() | {'masks': np.zeros((6, 8, 8))})
    with pytest.raises(ValueError, match='do not describe the same images'):
        metrics.evaluate(**split() | {'scores': np.zeros(5)})


def test_youden_by_hand():
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    point = metrics.youden(scores, [0, 0, 1, 0, 1, 1])
    # 2/3 - 0 at 0.5 and 1 - 1/3 at 0.3 are equally good: the lower false-positive rate wins.
    assert point == {'threshold': 0.5, 'tpr': pytest.approx(2 / 3), 'fpr': 0.0}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 1, 4]))
def test_youden_equals_the_best_point_of_the_roc_curve(seed, levels):
    data = split(seed, shape=(12, 8, 8), levels=levels)
    scores, labels = data['scores'], data['labels']
    point = metrics.youden(scores, labels)
    fpr, tpr, _ = sklearn_metrics.roc_curve(labels, scores, drop_intermediate=False)
    assert point['tpr'] - point['fpr'] == pytest.approx(np.max(tpr - fpr))
    decision = scores >= point['threshold']
    assert np.mean(decision[labels == 1]) == pytest.approx(point['tpr'])
    assert np.mean(decision[labels == 0]) == pytest.approx(point['fpr'])


def test_youden_of_an_inverted_score_raises_no_alarm():
    scores = np.array([1, 2, 3, 4], np.float32)
    point = metrics.youden(scores, [1, 1, 0, 0])
    assert (point['tpr'], point['fpr']) == (0, 0)
    assert not np.any(scores >= point['threshold'])
    assert np.isfinite(point['threshold'])


@pytest.mark.parametrize('scores', [[], [0.0, np.nan]])
def test_thresholds_refuse_what_they_cannot_use(scores):
    with pytest.raises(ValueError, match='no threshold can be chosen'):
        metrics.youden(np.array(scores), np.arange(len(scores)))
    with pytest.raises(ValueError, match='normal and defective'):
        metrics.youden(np.zeros(3), np.ones(3))


def test_the_margin_of_padded_images_does_not_count():
    """Images of several shapes, and a margin that scores higher than all of them."""
    data, valid = split(), np.zeros((6, 16, 16), bool)
    sides = [(16, 9), (5, 16), (16, 16), (7, 16), (16, 4), (16, 12)]
    cut = []
    for i, (height, width) in enumerate(sides):
        part = np.s_[i, 16 - height :, (16 - width) // 2 : (16 - width) // 2 + width]
        valid[part] = True
        data['masks'][part][1:3, 1:4] = i % 2
        cut.append((data['maps'][part], data['masks'][part]))
    data['masks'][~valid] = 0
    data['maps'][~valid] += 9
    maps, masks = zip(*cut, strict=True)
    values, reasons = metrics.evaluate(**data, valid=valid)
    pixels = np.concatenate([x.ravel() for x in maps])
    positive = np.concatenate([x.ravel() for x in masks]) > 0
    peaks = [x.max() for x in maps]
    expected = {
        'P-AUROC': sklearn_metrics.roc_auc_score(positive, pixels),
        'AP-loc': sklearn_metrics.average_precision_score(positive, pixels),
        'AUPRO': brute_aupro(maps, masks, 0.3),
        'seg-I-AUROC': sklearn_metrics.roc_auc_score(data['labels'], peaks),
        'seg-AP-det': sklearn_metrics.average_precision_score(data['labels'], peaks),
    }
    assert not reasons and {k: values[k] for k in expected} == pytest.approx(expected)
    assert values['AUPRO'] > metrics.evaluate(**data)[0]['AUPRO']
    # What is marked in the margin is no defect either.
    data['masks'][~valid] = 1
    assert metrics.evaluate(**data, valid=valid)[0] == values
    whole = metrics.evaluate(**split(), valid=np.ones((6, 16, 16), bool))
    assert whole == metrics.evaluate(**split())


@pytest.mark.slow
def test_seven_metrics_of_160_maps_take_seconds():
    data = split(shape=(160, 256, 256))
    data['masks'][1::2, 100:150, 100:150] = 1
    start = time.process_time()
    metrics.evaluate(**data)
    # About one second of one core; the allowance is for slower and busier machines.
    assert time.process_time() - start < 5
