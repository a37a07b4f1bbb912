"""The picture of a map, by hand."""

import numpy as np

from ssn_jax.report import overlays

DARK_BLUE, YELLOW = (68, 1, 84), (253, 231, 37)  # The ends of viridis.


def test_colours_by_hand():
    image = np.full((4, 6, 3), 100, np.uint8)
    heat = np.array([[0.2, 0.6, np.nan], [-1, 9, np.inf]])  # Stretched over twice its size.
    drawn = overlays.tint(image, heat, 0.2, 0.6).astype(int)
    bare = np.full(3, 0.6 * 100 + 51)
    for x, colour in ((0, 0.3 * bare + 0.7 * np.array(DARK_BLUE)), (5, bare)):
        assert np.abs(drawn[:, x] - colour).max() <= 2
    between = overlays.tint(image[:1, :3], heat[:1], 0.2, 0.6)
    assert np.abs(between[0, 1] - (0.3 * bare + 0.7 * np.array(YELLOW))).max() <= 2
    assert (image == 100).all()


def test_a_map_of_a_part():
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    drawn = overlays.tint(image, np.ones((2, 2)), part=np.s_[2:5, 3:])
    alone = overlays.tint(np.ascontiguousarray(image[2:5, 3:]), np.ones((2, 2)))
    assert (drawn[2:5, 3:] == alone).all()
    grey = np.ptp(drawn.astype(int), axis=-1) == 0
    assert grey[:2].all() and grey[5:].all() and grey[:, :3].all() and not grey[2:5, 3:].any()


def test_outlines_surround_regions():
    picture = np.full((80, 120, 3), 100, np.uint8)
    regions = np.zeros((20, 30), bool)
    regions[5:15, 10:20] = True  # At the picture's rows 20 to 60 and columns 40 to 80.
    regions[9:11, 14:16] = False
    drawn = picture.copy()
    overlays.outline(drawn, regions, 1)
    assert (drawn[26:54, 42] > 200).all() and (drawn[26:54, 41] < 60).all()
    assert (drawn[:18] == 100).all() and (drawn[26:30, 46:74] == 100).all()
    assert drawn[32:48, 52:68].max() > 200  # A hole has an outline too.
