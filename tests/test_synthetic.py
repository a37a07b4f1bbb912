"""The embedded data set: exact masks, determinism, and images that vary."""

import itertools
import zlib

import cv2
import ml_collections
import numpy as np
import pytest

from ssn_jax import data
from ssn_jax.data import images, synthetic

DEFECTS = {
    'bearing': ['chip', 'fibre', 'missing_ball', 'scratch', 'stain'],
    'screw': ['manipulated_front', 'scratch_head', 'scratch_neck', 'thread_side', 'thread_top'],
    'surface': ['defect'],
}
PAIRS = [(category, defect) for category, defects in DEFECTS.items() for defect in defects]


def load(tmp_path, **fields):
    config = {'name': 'synthetic', 'root': '', 'category': '', 'cache': str(tmp_path), 'seed': 0}
    return data.load(ml_collections.ConfigDict(config | fields), (64, 32))


@pytest.mark.parametrize(('category', 'defect'), PAIRS)
def test_mask_is_where_the_image_differs(category, defect):
    for seed in range(4):
        image, normal, mask = synthetic.draw(category, defect, np.random.default_rng(seed))
        assert image.dtype == normal.dtype == mask.dtype == np.uint8
        different = (image != normal).reshape(*mask.shape, -1).any(-1)
        assert (different == (mask == 1)).all()
        assert 12 <= mask.sum() <= 0.25 * mask.size
        change = np.abs(image.astype(int) - normal)
        assert change[mask == 1].mean() > 12  # visible, and not only to a machine


@pytest.mark.parametrize('category', synthetic.CATEGORIES)
def test_normal_images_vary_and_have_no_mask(category):
    drawn = [synthetic.draw(category, 'good', np.random.default_rng(seed)) for seed in range(3)]
    for image, normal, mask in drawn:
        assert (image == normal).all()
        assert not mask.any()
        assert image.std() > 5  # a picture, not a plane
    for (one, _, _), (other, _, _) in itertools.combinations(drawn, 2):
        assert np.abs(one.astype(int) - other).mean() > 3


def test_drawing_follows_the_seed():
    def first(seed, count=3):
        return list(itertools.islice(synthetic.records('screw', seed), count))

    assert first(0) == first(0)
    assert all(a.image != b.image for a, b in zip(first(0), first(1), strict=True))
    # An image depends on its own name alone, not on what was drawn before it.
    record = first(0)[2]
    rng = np.random.default_rng([0, zlib.crc32(record.file.encode())])
    image, _, _ = synthetic.draw('screw', 'good', rng)
    assert (images.decode(record.image, '')[..., 0] == image).all()


def test_defects_go_unnoticed_by_the_mean():
    """The embedded set would be no test if an image's brightness gave its defect away."""
    rng = np.random.default_rng(0)
    good = [synthetic.draw('screw', 'good', rng)[0].mean() for _ in range(12)]
    bad = [synthetic.draw('screw', 'thread_top', rng)[0].mean() for _ in range(12)]
    assert min(good) < np.median(bad) < max(good)


def test_load(tmp_path):
    dataset = load(tmp_path, category='screw')
    assert (dataset.name, dataset.category, dataset.embedded) == ('synthetic', 'screw', True)
    train, test = {'good': 60}, {'good': 12} | dict.fromkeys(DEFECTS['screw'], 6)
    for split, counts in ((dataset.train, train), (dataset.test, test)):
        assert {d: split.defects.count(d) for d in split.defects} == counts
        assert split.has_mask.all()
        assert ((np.array(split.defects) != 'good') == split.labels).all()
    assert (dataset.test.masks.any((1, 2)) == (dataset.test.labels == 1)).all()
    # The set of the same name and category that a real root would have held.
    again = load(tmp_path, category='screw', name='mvtec_ad')
    assert again.embedded
    assert (again.test.images == dataset.test.images).all()


def test_ksdd2_without_a_root_is_the_embedded_surface(tmp_path):
    dataset = load(tmp_path, name='ksdd2', category='screw')
    assert (dataset.category, dataset.embedded) == ('surface', True)
    assert (dataset.train.labels.sum(), len(dataset.train.labels)) == (12, 92)
    assert (dataset.test.labels.sum(), len(dataset.test.labels)) == (10, 40)
    assert dataset.train.has_mask.all()


def test_another_seed_is_another_prepared_set(tmp_path, monkeypatch):
    tiny = {'train': {'good': 1}, 'test': {'good': 1}}
    monkeypatch.setitem(synthetic._COUNTS, 'screw', tiny)
    zero, one = (load(tmp_path, category='screw', seed=seed) for seed in (0, 1))
    assert (zero.train.images != one.train.images).any()
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(synthetic, 'VERSION', synthetic.VERSION + 1)
    load(tmp_path, category='screw')
    assert len(list(tmp_path.iterdir())) == 3


def test_images_are_png_of_the_size_of_their_model():
    sizes = {'bearing': (256, 256, 3), 'screw': (256, 256), 'surface': (640, 232)}
    for category, size in sizes.items():
        record = next(synthetic.records(category, 0))
        assert record.image.startswith(b'\x89PNG')
        stored = cv2.imdecode(np.frombuffer(record.image, np.uint8), cv2.IMREAD_UNCHANGED)
        assert stored.shape == size
