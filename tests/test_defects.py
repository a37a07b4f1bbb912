"""Drawn defects: where they are, that masks tell the truth, and that they follow from a seed."""

import dataclasses
import re

import commands
import cv2
from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from ssn_jax.config import default_config
from ssn_jax.data import Split, augment, defects, images as images_lib, synthetic
from ssn_jax.losses import targets


def product(seed=0, size=(96, 128)):
    """A bright noisy disc on dark ground, and where it is."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]]
    disc = (rows - size[0] / 2) ** 2 + (columns - size[1] / 2) ** 2 < (0.31 * min(size)) ** 2
    image = np.where(disc, 170, 40)[..., None] + rng.normal(0, 10, (*size, 3))
    return image.clip(0, 255).astype(np.uint8), disc


@pytest.mark.parametrize('bright', [True, False])
def test_foreground_is_the_product(bright):
    image, disc = product()
    found = defects.foreground(image if bright else 255 - image)
    assert found[disc].mean() > 0.99
    assert found[~disc].mean() < 0.1


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(sorted(defects.KINDS)),
    size=st.tuples(st.integers(32, 96), st.integers(32, 96)),
    seed=st.integers(0, 2**32 - 1),
)
def test_outside_its_mask_an_image_looks_the_same(kind, size, seed):
    image, _ = product(seed, size)
    other, _ = product(seed + 1, size)
    before = image.copy()
    drawn, mask = defects.draw_one(image, other, kind, np.random.default_rng(seed))
    assert drawn.shape == image.shape
    assert drawn.dtype == mask.dtype == np.uint8
    np.testing.assert_array_equal(image, before)
    assert set(np.unique(mask)) <= {0, 1}
    difference = np.abs(drawn.astype(int) - image).max(-1)
    assert difference[mask == 0].max(initial=0) <= 10
    if mask.any():
        assert difference[mask == 1].max() > 10


@pytest.mark.parametrize('kind', defects.KINDS)
def test_every_kind_can_be_seen_on_a_product(kind):
    image, disc = product(0, (192, 256))
    rng = np.random.default_rng(3)
    masks = [defects.draw_one(image, image, kind, rng)[1] for _ in range(20)]
    sizes = np.array([mask.sum() for mask in masks])
    assert (sizes >= 15 * 0.75).mean() > 0.9
    assert np.mean([mask[disc].sum() / mask.sum() for mask in masks if mask.any()]) > 0.6


SAME = {'angle': 'same', 'place': 'same', 'surface': 'object'}
ANY = {'angle': 'any', 'place': 'any', 'surface': 'object'}
WOVEN = {'angle': 'same', 'place': 'any', 'surface': 'texture'}


def test_kinds_of_products():
    """What is moved is a defect where places are the same, and nothing breaks off a texture."""
    same, anywhere, woven = (set(defects.kinds_of(x)) for x in (SAME, ANY, WOVEN))
    assert same - anywhere == {'swap', 'double', 'move', 'turn', 'remove', 'stain', 'blur'}
    assert woven - anywhere == {'turn', 'thread', 'remove', 'stain', 'blur'}
    assert anywhere - woven == {'break'}


@settings(max_examples=40, deadline=None)
@given(
    product=st.sampled_from([SAME, ANY, WOVEN]),
    size=st.tuples(st.integers(64, 128), st.integers(64, 128)),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_real_defect_is_as_much_darker_elsewhere(product, size, seed):
    """One of 60 on 140 is one of 20 on 100, and beside it nothing has changed."""
    image, source = (np.full((*size, 3), x, np.uint8) for x in (100, 140))
    mask = np.zeros(size, np.uint8)
    mask[20:32, 24:40] = 1
    source[mask > 0] = 60
    rng = np.random.default_rng(seed)
    drawn, found = defects.transplant(image, source, mask, product, rng)
    assert drawn.dtype == found.dtype == np.uint8 and set(np.unique(found)) == {0, 1}
    # What is cut off by the image's edge has its own edge there.
    inner = cv2.erode(found, np.ones((9, 9)), borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
    outer = cv2.dilate(found, np.ones((9, 9))) > 0
    assert np.abs(drawn[inner].astype(int) - 20).max(initial=0) <= 2
    np.testing.assert_array_equal(drawn[~outer], image[~outer])
    assert found.sum() <= 2.2 * mask.sum()
    if product is SAME:
        middle = np.argwhere(found).mean(0)
        # Five standard deviations of 4 units, and a part may lie outside.
        assert np.abs(middle - (25.5, 31.5)).max() < 20 * defects.unit(image) + 8


def test_a_real_defect_of_an_image_of_another_shape():
    """A line of one pixel, that half as large an image has no whole pixel of."""
    image, source = np.full((64, 80, 3), 100, np.uint8), np.full((130, 160, 3), 140, np.uint8)
    mask = np.zeros((130, 160), np.uint8)
    mask[60, 20:140] = 1
    for seed in range(10):
        rng = np.random.default_rng(seed)
        drawn, found = defects.transplant(image, source, mask, ANY, rng)
        assert drawn.shape == image.shape and found.shape == image.shape[:2]
        assert 10 < found.sum() < 200


def test_one_of_four_drawn_defects_is_a_real_one_if_there_is_any():
    """It alone is blue."""
    good = np.full((12, 64, 64, 3), 120, np.uint8)
    bad, mask = good[:1].copy(), np.zeros((1, 64, 64), np.uint8)
    mask[0, 20:40, 20:40] = 1
    bad[mask > 0] = 0, 0, 255
    config = default_config()
    config.drawn.count = 200
    config.product.update(ANY)
    images, labels = np.concatenate([good, bad]), np.int32([0] * 12 + [1])
    for masks, share in ((mask, 0.25), (0 * mask, 0.0)):
        masks = np.concatenate([np.zeros((12, 64, 64), np.uint8), masks])
        known = (labels == 0) | masks.any((1, 2))
        split = Split(images, masks, known, labels, ('',) * 13, ('',) * 13)
        shown = augment.Shown(config, split)
        drawn = [shown[i] for i in range(len(shown) - 200, len(shown))]
        blue = [image[found > 0].mean(0) if found.any() else np.zeros(3) for image, found in drawn]
        real = np.mean([x[2] - x[0] > 150 for x in blue])
        assert abs(real - share) <= 4 * np.sqrt(share * (1 - share) / 200)


@settings(max_examples=15, deadline=None)
@given(kind=st.sampled_from(sorted(defects.KINDS)), seed=st.integers(0, 2**32 - 1))
def test_defects_grow_with_the_image(kind, seed):
    """The same choices on an image of twice the size: a mask of about the same share of it."""
    rows, columns = np.mgrid[:128, :128]
    stripes = 90 + 80 * np.sin(rows / 2) * (np.hypot(rows - 64, columns - 64) < 40)
    image = stripes[..., None].repeat(3, -1).astype(np.uint8)
    shares = []
    for scale in (1, 2):
        scaled = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        rngs = (np.random.default_rng([seed, i]) for i in range(40))
        masks = [defects.draw_one(scaled, scaled, kind, rng)[1].mean() for rng in rngs]
        shares.append(np.mean(masks))
    assert 0.5 < shares[1] / shares[0] < 2


def test_the_direction_of_threads():
    rows, columns = np.mgrid[:96, :96].astype(np.float32)
    for degrees in (0, 12, 30, 44, -20):
        angle = np.deg2rad(degrees)
        wave = np.sin(0.8 * (rows * np.cos(angle) - columns * np.sin(angle)))
        image = (128 + 100 * wave[..., None].repeat(3, -1)).astype(np.uint8)
        found = np.rad2deg(defects._direction(image))
        assert abs((found - degrees + 45) % 90 - 45) < 2


def test_what_is_hidden_continues_what_is_around():
    """A ramp goes on where a part of it is hidden."""
    ramp = np.linspace(40, 200, 96)[None, :, None] * np.ones((96, 1, 3))
    image, window = ramp.astype(np.uint8), np.s_[20:80, 20:80]
    hidden = np.zeros((60, 60, 1), np.float32)
    hidden[20:40, 20:40] = 1
    filled = defects._filled(image, window, hidden, np.random.default_rng(0))
    assert np.abs(filled - ramp[window]).max() < 12


def test_the_docs_list_every_kind():
    page = (commands.ROOT / 'docs' / 'supervision.md').read_text()
    rows = re.findall(r'^\| `(\w+)` \| [^|]+ \| (\d+) \| ([\d.]+) to ([\d.]+) \|', page, re.M)
    listed = {name: (int(share), float(low), float(high)) for name, share, low, high in rows}
    assert listed == {
        name: (kind.share, *(float(f'{100 * area / 256**2:.1g}') for area in kind.areas))
        for name, kind in defects.KINDS.items()
    }


def draw_all(images, count, seed, product=ANY):
    """So many images with a defect, and their masks."""
    drawn = (defects.draw(images.__getitem__, len(images), i, seed, product) for i in range(count))
    return tuple(np.stack(x) for x in zip(*drawn, strict=True))


@pytest.mark.parametrize('level', [0, 128, 255])
def test_images_that_hold_nothing(level):
    """On a constant image only a tone can be seen; nothing fails."""
    image = np.full((64, 64, 3), level, np.uint8)
    drawn, masks = draw_all([image], 4, 0)
    assert drawn.shape == (4, 64, 64, 3)
    assert masks.shape == (4, 64, 64)


def test_defects_follow_from_the_seed():
    images = np.stack([product(i)[0] for i in range(3)])
    first, again, other = (draw_all(images, 12, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0] != other[0]).any()
    # No two are alike, and none depends on how many there are.
    assert len({x.tobytes() for x in first[0]}) == 12
    np.testing.assert_array_equal(draw_all(images, 5, 0)[0], first[0][:5])


def test_kinds_come_as_often_as_their_shares_say(monkeypatch):
    seen = []

    def draw_one(image, other, kind, rng):
        seen.append(str(kind))
        return image, np.zeros(image.shape[:2], np.uint8)

    monkeypatch.setattr(defects, 'draw_one', draw_one)
    draw_all([product()[0]] * 2, 3000, 0, SAME)
    shares = defects.kinds_of(SAME)
    for kind, share in shares.items():
        expected = share / sum(shares.values())
        assert abs(seen.count(kind) / 3000 - expected) < 4.5 * np.sqrt(expected / 3000)


def make_split():
    """Two normal images, and a defective one whose mask is unknown."""
    rng = np.random.default_rng(0)
    drawn = [synthetic.draw('screw', 'good', rng)[0] for _ in range(3)]
    return Split(
        images=np.stack([cv2.resize(x, (64, 64))[..., None].repeat(3, -1) for x in drawn]),
        masks=np.zeros((3, 64, 64), np.uint8),
        has_mask=np.array([True, True, False]),
        labels=np.array([0, 0, 1], np.int32),
        defects=('good', 'good', 'dent'),
        files=('a', 'b', 'c'),
    )


def shown_images(turned, drawn, seed=0):
    """What the steps are shown of `make_split`: the whole, its images and their masks."""
    config = default_config()
    config.product.angle = 'any'
    config.turned_copies, config.drawn.count, config.drawn.seed = turned, drawn, seed
    shown = augment.Shown(config, make_split())
    return shown, *(np.stack(x) for x in zip(*(shown[i] for i in range(len(shown))), strict=True))


def test_turned_copies():
    """They stand behind the normal images, before the defective ones, and are turned images."""
    given = make_split()
    shown, images, masks = shown_images(2, 0)
    assert shown.labels.tolist() == [0] * 6 + [1] * 4
    assert shown.has_mask.tolist() == [True] * 6 + [False] * 4
    assert not shown.masked and not masks.any()
    np.testing.assert_array_equal(images[[0, 1, 6]], given.images)
    np.testing.assert_array_equal(images, shown_images(2, 0)[1])
    assert len({image.tobytes() for image in images}) == 10
    assert (shown_images(2, 0, seed=1)[1][2:6] != images[2:6]).any((1, 2, 3)).all()


@pytest.mark.parametrize('angle', ['same', 'any'])
def test_the_margin_of_padded_images_stays(angle):
    """Whatever is made of them: turned, flipped, or with a defect, within each one's own place."""
    given = make_split()
    inside = (np.s_[0:64, 20:45], np.s_[30:35, 0:64], np.s_[7:56, 0:64])
    fitted = np.full_like(given.images, images_lib.GREY)
    for one, image, part in zip(fitted, given.images, inside, strict=True):
        one[part] = np.maximum(image[part], 125)  # Of nothing that is grey.
    masks = given.masks.copy()
    masks[2, 7:10, 1:5] = 1
    split = dataclasses.replace(given, images=fitted, masks=masks, inside=inside)
    config = default_config()
    config.product.update(angle=angle, surface='texture')
    config.turned_copies, config.drawn.count = 2, 40
    shown = augment.Shown(config, split)
    assert shown.padded and len(shown) == 2 * (3 if angle == 'any' else 1) + 4 + 40
    for i in range(len(shown)):
        image, mask = shown[i]
        margin = np.ones((64, 64), bool)
        margin[inside[shown.sources[i]]] = False
        assert image.shape == (64, 64, 3) and mask.shape == (64, 64)
        assert (image[margin] == images_lib.GREY).all() and not mask[margin].any()
        if shown.real[i]:
            assert mask.sum() == 12
    real = np.flatnonzero(shown.real)
    corners = [shown[i][1][np.ix_([7, 55], [1, 62])].ravel().tolist() for i in real]
    assert sorted(corners) == sorted(np.eye(4).tolist())
    # Where positions are taken: 12 pixels beyond the image, in whole positions of 4.
    own = targets.own(inside, (64, 64), (16, 16))[..., 0]
    assert own[0].any(0).tolist() == [8 // 4 <= i < 15 for i in range(16)] and own[0].any(1).all()
    assert own[1].any(1).tolist() == [18 // 4 <= i < 12 for i in range(16)]
    product = targets.product(fitted, (16, 16), inside)[..., 0]
    assert product.any() and not product[~(own > 0)].any()


@pytest.mark.parametrize('kind', defects.KINDS)
@pytest.mark.parametrize('size', [(1, 64), (3, 64), (64, 2)])
def test_defects_in_strips(kind, size):
    """As 200x5000 pixels become where they are padded to a square."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (*shape, 3), np.uint8) for shape in (size, (9, 9))]
    image, mask = defects.draw_one(*images, kind, rng)
    assert image.shape == images[0].shape and mask.shape == size


@pytest.mark.parametrize('size', [1, 4, 1000])
def test_parts_are_all_images_in_order(size):
    shown, images, masks = shown_images(1, 8)
    assert shown.shape == (2 * 2 + 4 + 8, 64, 64, 3) == images.shape
    parts = list(shown.parts(size))
    assert [len(part) for _, part, _ in parts[:-1]] == [size] * (len(parts) - 1)
    for places, part, masks_of_part in parts:
        np.testing.assert_array_equal(part, images[places])
        np.testing.assert_array_equal(masks_of_part, masks[places])
    assert sum(len(part) for _, part, _ in parts) == len(shown)


def test_turning_keeps_the_middle_and_turns_the_rest():
    """A spot near the middle of a black image comes to lie at its own distance from it."""
    image = np.zeros((65, 65, 3), np.uint8)
    image[31:34, 31:34] = 100
    image[30:35, 40:45] = 255
    rows, columns = np.mgrid[:65, :65] - 32.0
    for angle in (10, 75, 180, 301):
        turned = augment.turn(image, angle)[..., 0].astype(float)
        assert turned[32, 32] == 100
        spot = np.where(turned > 120, turned, 0)
        down, right = ((spot * x).sum() / spot.sum() for x in (rows, columns))
        expected = 10 * np.array([-np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))])
        np.testing.assert_allclose([down, right], expected, atol=0.5)


def test_product_of_images_at_the_feature_grid():
    images = make_split().images
    places = targets.product(images, (16, 16))
    assert places.shape == (3, 16, 16, 1)
    for image, found in zip(images, places[..., 0], strict=True):
        share = defects.foreground(image).reshape(16, 4, 16, 4).mean((1, 3))
        assert 0 < found.sum() < found.size
        np.testing.assert_array_equal(found[share != 0.5], share[share != 0.5] > 0.5)


def test_drawn_defects_stand_last():
    given = make_split()
    shown, images, masks = shown_images(0, 4)
    assert shown.labels.tolist() == [0, 0] + 8 * [1]
    assert shown.has_mask.tolist() == [True, True] + 4 * [False] + 4 * [True]
    assert shown.masked
    np.testing.assert_array_equal(images[:3], given.images)
    assert masks[6:].any((1, 2)).sum() >= 3
    assert not masks[:6].any()
    for image, drawn, mask in zip(given.images[[0, 1, 0, 1]], images[6:], masks[6:], strict=True):
        np.testing.assert_allclose(drawn[mask == 0], image[mask == 0].astype(int), atol=10)
