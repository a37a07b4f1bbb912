"""What files hold and what is read of them: masks, values, pages and orientation."""

import csv
import io
import json
import os
from pathlib import Path
import shutil
import struct

import cv2
import ml_collections
import numpy as np
from PIL import Image
import pytest
import tifffile
import tiny

from ssn_jax import (
    config as config_lib,
    data,
    export,
    pipeline,
    predict_folder,
    predictor,
    run as run_lib,
)
from ssn_jax.data import builders, doubts, images, layouts, masks
from ssn_jax.errors import UserError

SIZE = (96, 96)


@pytest.fixture(scope='module')
def cases():
    if 'SSN_JAX_CASES' not in os.environ:
        pytest.skip('SSN_JAX_CASES does not name a folder of cases')
    return Path(os.environ['SSN_JAX_CASES'])


@pytest.fixture
def load(tmp_path):
    """Loads a folder as a data set, with its own cache."""

    def load(root, size=SIZE, name='folder', **fields):
        config = {'name': name, 'root': str(root), 'category': 'nut', 'seed': 0}
        config |= {'cache': str(tmp_path / 'cache')} | fields
        return data.load(ml_collections.ConfigDict(config), size)

    return load


def save(picture, kind, **options) -> bytes:
    """A picture, an array or of Pillow, as a file of Pillow's."""
    file = io.BytesIO()
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(file, kind, **options)
    return file.getvalue()


def tiff(values, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def png(values) -> bytes:
    return cv2.imencode('.png', values)[1].tobytes()


def overlap(found, truth) -> float:
    """The intersection over the union of two masks."""
    return np.count_nonzero(found & truth) / np.count_nonzero(found | truth)


def shapes(seed, scale=1) -> np.ndarray:
    """One to three ellipses or rectangles, uint8 (96, 96) times `scale`, of zeros and ones."""
    rng, region = np.random.default_rng(seed), np.zeros((scale * 96, scale * 96), np.uint8)
    for _ in range(rng.integers(1, 4)):
        x, y = (scale * int(n) for n in rng.integers(16, 80, 2))
        a, b = (scale * int(n) for n in rng.integers(5, 14, 2))
        if rng.integers(2):
            cv2.ellipse(region, (x, y), (a, b), int(rng.integers(180)), 0, 360, 1, -1)
        else:
            cv2.rectangle(region, (x, y), (x + a, y + b), 1, -1)
    return region


def painted(region, paint, ground=(0, 0, 0)) -> np.ndarray:
    """A picture (H, W, C) of a region in one colour on a ground of another."""
    return np.where(region[..., None] > 0, np.uint8(paint), np.uint8(ground))


def palette(region, colours, kind='PNG') -> bytes:
    picture = Image.fromarray(region).convert('P')
    picture.putdata(list(region.ravel()))
    picture.putpalette(colours + [0] * (768 - len(colours)))
    return save(picture, kind)


# Masks

EXACT = {
    '0 and 1': png,
    '0 and 255': lambda region: png(region * 255),
    'a faint label': lambda region: png(region * 7),
    '16 bits': lambda region: png(region.astype(np.uint16) * 300),
    'float': lambda region: tiff(region.astype(np.float32)),
    '64 bits': lambda region: tiff(region.astype(np.float64) * 0.25),
    '32 bits': lambda region: tiff(region.astype(np.int32) * 3),
    '1 bit': lambda region: save(region > 0, 'PNG'),
    'white is zero': lambda region: tiff(255 - region * 255, photometric='miniswhite'),
    'labels 1 and 2': lambda region: png(region + 1),
    'palette': lambda region: palette(region, [0, 0, 0, 128, 0, 0]),
    'palette, all black': lambda region: palette(region, [0] * 6),
    'gif': lambda region: palette(region, [0, 0, 0, 0, 0, 200], 'GIF'),
    'red': lambda region: save(painted(region, (255, 0, 0)), 'PNG'),
    'dark blue': lambda region: save(painted(region, (0, 0, 90)), 'PNG'),
    'red on white': lambda region: save(painted(region, (255, 0, 0), (255, 255, 255)), 'PNG'),
    'green on grey': lambda region: save(painted(region, (0, 255, 0), (128, 128, 128)), 'PNG'),
    'white on transparent': lambda region: save(
        painted(region, (255, 255, 255, 255), (255, 255, 255, 0)), 'PNG'
    ),
    'black on transparent': lambda region: save(
        painted(region, (0, 0, 0, 255), (0, 0, 0, 0)), 'PNG'
    ),
    'half transparent': lambda region: save(painted(region, (9, 9, 9, 128), (0, 0, 0, 0)), 'PNG'),
    'on half transparent': lambda region: save(
        painted(region, (255, 0, 0, 255), (0, 0, 0, 100)), 'PNG'
    ),
    'black, alpha of grey, in TIFF': lambda region: save(
        np.stack([0 * region, 255 * region], -1), 'TIFF'
    ),
    'black where white is transparent': lambda region: save(
        255 - 255 * region, 'PNG', transparency=255
    ),
    'opaque': lambda region: save(painted(region, (255, 255, 255, 255), (0, 0, 0, 255)), 'PNG'),
    'lossless webp': lambda region: save(painted(region, (255, 9, 0)), 'WEBP', lossless=True),
}


@pytest.mark.parametrize('kind', EXACT)
def test_lossless_masks_are_read_to_the_pixel(kind):
    for seed in range(8):
        region = shapes(seed)
        assert (images.decode_mask(EXACT[kind](region), kind) == region).all()


def test_the_faintest_label_counts_beside_the_brightest():
    region = np.zeros(SIZE, np.uint8)
    region[20:40, 20:40], region[20:40, 40:60] = 255, 1  # They touch.
    region[70:80, 10:30], region[90, 5:90] = 1, 1  # Alone, and a thin line.
    for picture in (region, region.astype(np.uint16) * 200):
        assert (images.decode_mask(png(picture), 'a.png') == (region > 0)).all()


def test_many_instances_count():
    region = np.zeros(SIZE, np.uint8)
    for i in range(64):
        region[12 * (i // 8) + 1 : 12 * (i // 8) + 9, 12 * (i % 8) + 1 : 12 * (i % 8) + 7] = i + 1
    assert (images.decode_mask(png(region), 'a.png') == (region > 0)).all()


def test_soft_edges_end_at_half():
    for seed in range(8):
        soft = cv2.resize(shapes(seed, 4) * 255, SIZE[::-1], interpolation=cv2.INTER_AREA)
        assert overlap(images.decode_mask(png(soft), 'a.png'), soft >= 128) >= 0.98
    row = np.zeros(SIZE, np.float32)
    row[:] = np.clip((np.arange(96) - 40) / 20, 0, 1)  # From 0 to 1: half of it at 50.
    found = images.decode_mask(tiff(row), 'a.tif')
    assert not found[:, :50].any() and found[:, 50:].all()


PAINTS = {'white': (255, 255, 255), 'grey': (128, 128, 128), 'red': (255, 0, 0)}
PAINTS |= {'green': (0, 255, 0), 'yellow': (255, 255, 0), 'pink': (255, 80, 160)}


@pytest.mark.parametrize('paint', PAINTS)
@pytest.mark.parametrize('quality', [75, 90, 95, 100])
@pytest.mark.parametrize('kind', ['JPEG', 'WEBP'])
def test_lossy_masks_lose_little(kind, quality, paint):
    """As they are, and saved as PNG since."""
    found = []
    for seed in range(8):
        region = shapes(seed)
        lossy = save(painted(region, PAINTS[paint]), kind, quality=quality)
        for file in (lossy, save(Image.open(io.BytesIO(lossy)), 'PNG')):
            found.append(overlap(images.decode_mask(file, kind), region))
    assert np.mean(found) >= 0.98 and min(found) >= 0.95


def test_masks_of_one_colour():
    for value, expected in ((0, 0), (1, 1), (255, 1)):
        assert (images.decode_mask(png(np.full(SIZE, value, np.uint8)), 'a.png') == expected).all()


def test_a_mask_of_no_numbers_is_refused():
    values = np.zeros(SIZE, np.float32)
    values[3, 3] = np.nan
    with pytest.raises(UserError, match=r'a\.tif: holds values that are no numbers'):
        images.decode_mask(tiff(values), 'a.tif')


def test_resizing_loses_no_region():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mask = np.zeros((200, 300), np.uint8)
        for _ in range(rng.integers(1, 9)):
            row, column = rng.integers(0, 200), rng.integers(0, 300)
            mask[row : row + rng.integers(1, 30), column : column + rng.integers(1, 30)] = 1
        small = masks.resize(mask, (32, 40))
        assert small.shape == (32, 40) and small.dtype == np.uint8 and small.max() == 1
        count, parts = cv2.connectedComponents(mask)
        for part in range(1, count):
            rows, columns = np.nonzero(parts == part)
            assert small[rows * 32 // 200, columns * 40 // 300].any()
        share = cv2.resize(mask.astype(np.float32), (40, 32), interpolation=cv2.INTER_AREA)
        assert (small[share > 0.5] == 1).all() and not small[share == 0].any()
    assert (masks.resize(mask, (200, 300)) == mask).all()
    assert not masks.resize(np.zeros((50, 60), np.uint8), (8, 8)).any()
    grown = masks.resize(np.eye(4, dtype=np.uint8), (40, 40))
    assert 0.2 <= grown.mean() <= 0.3 and grown[2, 2] == 1 and grown[2, 38] == 0


# A data set whose masks are doubtful


def plates(root, region, name='blot'):
    """Normal plates, and a defective one with its mask (file name, bytes)."""
    rng = np.random.default_rng(0)
    for place in ('train/good/0', 'train/good/1', 'test/good/0', f'test/{name}/0'):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / f'{place}.png'), rng.integers(90, 110, SIZE, np.uint8))
    truth = root / 'ground_truth' / name
    truth.mkdir(parents=True)
    (truth / '0_mask.png').write_bytes(region)


def line():
    region = np.zeros(SIZE, np.uint8)
    region[41, 10:80] = 255
    return region


DOUBTFUL = {
    'empty mask': np.zeros(SIZE, np.uint8),
    'large mask': 255 - shapes(0) * 255,
    'lost mask': line(),
}


@pytest.mark.parametrize('kind', DOUBTFUL)
def test_a_doubtful_mask_is_told_and_not_known(kind, load, tmp_path, caplog):
    plates(tmp_path / 'root', png(DOUBTFUL[kind]))
    dataset = load(tmp_path / 'root', (32, 32), masks='nearest')
    assert dataset.doubts == (doubts.Doubt('test/blot/0.png', kind),)
    assert doubts.count(dataset.doubts) == {kind: 1}
    assert dataset.test.has_mask.tolist() == [False, True]  # Of the defect, and a normal image.
    assert not dataset.test.masks.any()
    [told] = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    assert told == f'1 of the test images (test/blot/0.png): {doubts.REASONS[kind]}'


def test_a_thin_region_stays_in_a_folder(load, tmp_path):
    plates(tmp_path / 'root', png(line()))
    dataset = load(tmp_path / 'root', (32, 32))
    assert not dataset.doubts and dataset.test.has_mask.all() and dataset.test.masks[0].any()


def test_many_doubts_are_one_line(caplog):
    doubts.log([doubts.Doubt(f'{n}.png', 'empty mask') for n in range(100)], 'test')
    [told] = [r.getMessage() for r in caplog.records]
    assert told.startswith('100 of the test images (0.png, 1.png, 2.png, ...): its mask is empty')


# Values


def deep(bits) -> np.ndarray:
    """A faint picture of so many bits, uint16: 40 to 60 % of white."""
    rows, columns = np.mgrid[:96, :96]
    return np.round((0.5 + 0.1 * np.sin(rows / 9) * np.cos(columns / 7)) * (2**bits - 1)).astype(
        np.uint16
    )


def jp2(values) -> bytes:
    return cv2.imencode('.jp2', values)[1].tobytes()


@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
@pytest.mark.parametrize('write', [png, tiff, jp2], ids=['png', 'tiff', 'jp2'])
def test_each_depth_keeps_its_contrast(bits, write, load, tmp_path):
    root = tmp_path / 'root'
    plates(root, png(shapes(0)))
    expected = np.round(deep(16) / (2**16 - 1) * 255)
    suffix = write.__name__
    for split in ('train', 'test'):
        (root / split / f'good/deep.{suffix}').write_bytes(write(deep(bits)))
    dataset = load(root)
    assert dataset.white == 2**bits - 1
    assert {doubt.kind for doubt in dataset.doubts} == {'in both splits'}
    for split in (dataset.train, dataset.test):
        [place] = [i for i, name in enumerate(split.files) if 'deep' in name]
        assert np.abs(split.images[place] - expected[..., None]).max() <= 1
        assert len(np.unique(split.images[place])) >= 40


@pytest.mark.parametrize(
    ('values', 'white'),
    [
        (np.uint16([[3, 200]]), 255),
        (np.uint16([[3, 256]]), 1023),
        (np.uint16([[2000]]), 4095),
        (np.uint16([[40000]]), 65535),
        (np.int32([[70000]]), 2**18 - 1),
        (np.float32([[0.55]]), 1),
        (np.float32([[1.02]]), 2),
        (np.float32([[255]]), 255),
        (np.float64([[4000.5]]), 4095),
        (np.uint8([[3]]), 0),
    ],
)
def test_white_is_that_of_the_bits(values, white):
    assert images.white_of(values) == white


def test_float_files_are_read(load, tmp_path):
    root = tmp_path / 'root'
    plates(root, png(shapes(0)))
    values = (deep(16) / (2**16 - 1)).astype(np.float32)
    colours = np.stack([values, values / 2, values / 4], -1)
    (root / 'train/good/a.tif').write_bytes(tiff(values))
    (root / 'train/good/b.tif').write_bytes(tiff(colours, photometric='rgb'))
    dataset = load(root)
    grey, coloured = (
        dataset.train.images[dataset.train.files.index(f'train/good/{n}.tif')] for n in 'ab'
    )
    assert dataset.white == 1
    assert (grey == np.round(values * 255)[..., None]).all()
    assert (coloured == np.round(colours * 255)).all()


@pytest.mark.parametrize('kind', ['.pfm', '.hdr', '.jp2', '.ppm'])
def test_other_deep_files_in_colour(kind):
    colours = np.stack([deep(12), deep(12) // 2, deep(12) // 4], -1)
    values = colours if kind in ('.jp2', '.ppm') else (colours / 4095).astype(np.float32)
    encoded = cv2.imencode(kind, values[..., ::-1])[1].tobytes()
    found = images.pixels(encoded, kind)
    assert images.white_of(found) == (4095 if values is colours else 1)
    # Radiance has 8 bits beside the exponent of the brightest channel; JPEG 2000 loses a little.
    found = images.decode(encoded, kind, white=images.white_of(found))
    np.testing.assert_allclose(found, colours / 4095 * 255, atol=1.5)


@pytest.mark.parametrize('bits', [10, 12])
def test_packed_tiff(bits):
    """Of 12 bits in 12, which OpenCV reads as of 16."""
    packed = np.packbits((deep(bits)[..., None] >> np.arange(bits)[::-1]) & 1, axis=None)
    tags = {256: 96, 257: 96, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 96, 279: len(packed)}
    entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags.items())
    encoded = b'II*\0' + struct.pack('<I', 8 + len(packed)) + packed.tobytes()
    encoded += struct.pack('<H', len(tags)) + entries + bytes(4)
    found = images.decode(encoded, 'a.tif', white=images.white_of(images.pixels(encoded, 'a.tif')))
    assert np.abs(found[..., 0] - deep(bits) / (2**bits - 1) * 255).max() <= 1


def test_values_beyond_the_range_are_told(load, tmp_path, caplog):
    root = tmp_path / 'root'
    plates(root, png(shapes(0)))
    (root / 'train/good/deep.png').write_bytes(png(deep(12)))
    (root / 'test/good/deep.png').write_bytes(png(deep(16)))
    dataset = load(root)
    assert dataset.white == 4095
    assert dataset.doubts == (doubts.Doubt('test/good/deep.png', 'values'),)
    assert dataset.test.images[dataset.test.files.index('test/good/deep.png')].min() == 255
    by_hand = load(root, range=65535.0)
    assert by_hand.doubts == (doubts.Doubt('train/good/deep.png', 'values'),)  # Nearly black.
    caplog.clear()
    assert (images.decode(png(deep(14)), 'a.png', white=4095) == 255).any()
    [told] = [r.getMessage() for r in caplog.records]
    assert told.startswith('a.png: its values go from') and '0..4095 is cut' in told


def test_two_ranges_in_one_set_are_an_error(load, tmp_path):
    root = tmp_path / 'root'
    plates(root, png(shapes(0)))
    (root / 'train/good/a.tif').write_bytes(tiff(np.full(SIZE, 0.5, np.float32)))
    (root / 'train/good/b.png').write_bytes(png(deep(12)))
    with pytest.raises(
        UserError, match=r'a\.tif holds values of 0 to 1, and .*b\.png of 0 to 4095'
    ):
        load(root)


def test_white_is_zero_of_16_bits():
    straight = images.decode(tiff(deep(16)), 'a.tif')
    turned = images.decode(tiff(65535 - deep(16), photometric='miniswhite'), 'a.tif')
    assert np.abs(straight.astype(int) - turned).max() <= 1


def test_16_bits_are_as_opencv_reads_them():
    values = np.random.default_rng(0).integers(0, 2**16, (*SIZE, 3), np.uint16)
    for kind in ('.png', '.tiff', '.ppm'):
        encoded = cv2.imencode(kind, values)[1]
        expected = cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1]
        assert (images.decode(encoded.tobytes(), kind) == expected).all()


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(value):
    with pytest.raises(UserError, match='no numbers'):
        images.decode(tiff(np.full(SIZE, value, np.float32)), 'a.tif', white=1)


def test_a_float_file_without_a_range_is_refused():
    with pytest.raises(UserError, match=r'a\.tif: is of float32 to 0\.5, and not what white'):
        images.decode(tiff(np.full(SIZE, 0.5, np.float32)), 'a.tif')
    for values, white in ((np.full(SIZE, 0.5, np.float32), 4095), (deep(12), 1)):
        with pytest.raises(UserError, match='save it as the training images are'):
            images.decode(tiff(values), 'a.tif', white=white)
        with pytest.raises(ValueError, match='say what white is'):
            predictor.to_rgb(values, trained=white)


# Pages


def test_several_pages_are_refused():
    pages = [Image.fromarray(np.full(SIZE, value, np.uint8)) for value in (10, 200, 90)]
    for kind in ('TIFF', 'GIF', 'PNG', 'WEBP'):
        file = save(pages[0], kind, save_all=True, append_images=pages[1:])
        for read in (images.decode, images.decode_mask):
            with pytest.raises(UserError, match='a: holds 3 pages: split it into one file a page'):
                read(file, 'a')
    for options in ({'bigtiff': True}, {'volumetric': True}):
        file = tiff(np.zeros((2, *SIZE), np.uint8), photometric='minisblack', **options)
        with pytest.raises(UserError, match='holds 2 pages'):
            images.decode(file, 'a')


def test_a_preview_is_no_page():
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(np.full(SIZE, 90, np.uint8))
        writer.write(np.full((24, 24), 90, np.uint8), subfiletype=1)
    assert (images.decode(file.getvalue(), 'a.tif') == 90).all()


# Orientation


@pytest.mark.parametrize('orientation', range(1, 9))
def test_turning_is_what_opencv_does(orientation):
    region, exif = np.zeros((5, 7), np.uint8), Image.Exif()
    region[:2, :3], exif[274] = 255, orientation
    for kind in ('PNG', 'TIFF', 'WEBP'):
        encoded = save(region, kind, exif=exif, **{'lossless': True} if kind == 'WEBP' else {})
        assert (images.orientation(encoded) or 1) == orientation
        turned = images.decode(encoded, kind)[..., 0]
        assert (images.turn(region, orientation) == turned).all()
        assert (images.decode_mask(encoded, kind) == (turned > 0)).all()


def test_what_opencv_does_not_turn_is_not_turned():
    """An orientation that only XMP names, beside EXIF data without one."""
    region, exif = np.eye(8, 9, dtype=np.uint8) * 255, Image.Exif()
    exif[305] = 'some software'
    xmp = b'<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>'
    encoded = save(region, 'JPEG', exif=exif, xmp=xmp)
    assert Image.open(io.BytesIO(encoded)).getexif()[274] == 6
    assert images.decode(encoded, 'a.jpg').shape == (8, 9, 3)
    assert images.orientation(encoded) is None


@pytest.mark.parametrize('size', [(96, 96), (64, 96)])
@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_a_mask_is_turned_with_its_image(orientation, size, tmp_path):
    region, exif = np.zeros(size, np.uint8), Image.Exif()
    region[10:30, 20:70], exif[274] = 1, orientation
    picture = save(60 + 150 * region, 'JPEG', quality=95, exif=exif)
    record = layouts.Record('test', 'blot', '0.jpg', picture, png(region * 255))
    example = builders.example(record)
    shown = images.decode(picture, '')[..., 0] > 130
    assert overlap(images.read_mask(example['mask']), shown) >= 0.95
    # Where it would fit either way, that is told.
    assert example['turned'] == (orientation == 3 or (orientation > 3 and size == (96, 96)))
    upright = np.ascontiguousarray(images.turn(region, orientation))
    if size != (96, 96) and orientation > 3:  # A mask that fits the turned image only.
        record = layouts.Record('test', 'blot', '0.jpg', picture, png(upright * 255))
        assert (images.read_mask(builders.example(record)['mask']) == upright).all()
    # A mask that is turned by its own orientation.
    own = layouts.Record('test', 'blot', '0.jpg', picture, save(region * 255, 'PNG', exif=exif))
    assert (images.read_mask(builders.example(own)['mask']) == upright).all()


def test_a_mismatch_by_exif_says_so():
    region, exif = np.eye(64, 96, dtype=np.uint8), Image.Exif()
    exif[274] = 6
    mask = save(region * 255, 'PNG', exif=exif)
    record = layouts.Record('test', 'blot', '0.jpg', save(region, 'PNG'), mask)
    with pytest.raises(UserError, match='turned by its EXIF orientation: save both upright'):
        builders.example(record)


# The cases of others


def test_cases_masks(cases, load, tmp_path):
    truth = cv2.imread(str(cases / 'masks/truth.png'), cv2.IMREAD_GRAYSCALE) > 0
    dataset = load(cases / 'masks')
    of_masks = [doubt for doubt in dataset.doubts if 'mask' in doubt.kind]
    assert of_masks == [doubts.Doubt('test/blot/inverted.png', 'large mask')]
    found = {Path(n).stem: m for n, m in zip(dataset.test.files, dataset.test.masks, strict=True)}
    del found['0']
    assert not found.pop('inverted').any()
    # Its values are 0, 1 and 2: rounding has moved its edge.
    assert overlap(found.pop('jpg1'), truth) >= 0.95
    assert len(found) == 8
    assert min(overlap(mask, truth) for mask in found.values()) >= 0.98


def test_cases_depth(cases, load, tmp_path):
    expected = images.decode((cases / 'depth/u8.png').read_bytes(), 'u8')
    levels = len(np.unique(expected))
    for name in (
        'u16_full.png',
        'u12_in_u16.png',
        'u12_in_u16.tif',
        'f32_0_1.tif',
        'miniswhite.tif',
    ):
        root = tmp_path / name
        shutil.copytree(cases / 'exif/train', root / 'train')
        (root / 'test/good').mkdir(parents=True)
        shutil.copy(cases / 'depth' / name, root / 'train/good')
        shutil.copy(cases / 'depth' / name, root / 'test/good')
        found = load(root).test.images[0]
        assert len(np.unique(found)) >= levels - 2, name
        assert np.abs(found.astype(int) - expected).max() <= 2, name
    with pytest.raises(UserError, match='holds 2 pages'):
        images.decode((cases / 'depth/multipage.tif').read_bytes(), 'multipage.tif')
    with pytest.raises(UserError, match='holds 2 pages'):
        images.decode((cases / 'pages/good_then_defect.tif').read_bytes(), 'good_then_defect.tif')


def test_cases_exif(cases, load):
    """The defect is brighter than all that is normal, and its mask lies there."""
    dataset = load(cases / 'exif', (96, 64))
    [place] = np.flatnonzero(dataset.test.labels)
    bright = dataset.test.images[place, ..., 0] > 160
    assert overlap(dataset.test.masks[place], bright) >= 0.9


# With a run


def test_frames_are_read_as_files_are():
    frame = deep(12)
    file = images.decode(png(frame), 'a.png', white=4095)
    assert (predictor.to_rgb(frame, trained=4095) == file).all()
    assert (predictor.to_rgb(frame, 4095.0) == file).all()
    floats = (frame / 4095).astype(np.float32)
    assert (predictor.to_rgb(floats, trained=1) == images.decode(tiff(floats), '', white=1)).all()
    assert (predictor.to_rgb(np.full(SIZE, 5000, np.uint16), trained=4095) == 255).all()
    with pytest.raises(ValueError, match='no numbers'):
        predictor.to_rgb(np.full(SIZE, np.nan, np.float32), trained=1)


@pytest.mark.slow
def test_a_run_keeps_its_range(tmp_path):
    """Its test images have the scores in predict and in Python that they had in training."""
    tiny.write_weights(tmp_path / 'resnet18.safetensors')
    tiny.write_data(tmp_path / 'data')
    for path in (tmp_path / 'data').rglob('0*.png'):
        picture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        if 'ground_truth' not in path.parts:
            cv2.imwrite(str(path), np.uint16(picture) * 16)  # 8 bits, as 12 in 16.
    (broken,) = (tmp_path / 'data').glob('nut/ground_truth/spot/002_mask.png')
    cv2.imwrite(str(broken), np.zeros((64, 64), np.uint8))
    config, workdir = tiny.config(tmp_path), tmp_path / 'run'
    results = pipeline.train_and_evaluate(config, workdir, quiet=True)
    assert results['doubts'] == {'empty mask': 1}
    assert json.loads((workdir / 'found.json').read_text()) == {'data.range': 4095.0}
    assert 'nut/test/spot/002.png' in (workdir / 'log.txt').read_text()
    assert pipeline.train_and_evaluate(config, workdir, quiet=True)['doubts'] == results['doubts']

    scores = run_lib.read_scores(workdir).of('test')
    expected = dict(zip(scores.file, scores.score, strict=True))
    model = predictor.open_run(workdir, threshold=0.5)
    assert model.white == 4095 and export.metadata(model)['white'] == 4095
    predict_folder.predict(model, tmp_path / 'data/nut/test', tmp_path / 'out', overlays=False)
    with (tmp_path / 'out/predictions.csv').open() as table:
        rows = {f'nut/test/{row["file"]}': row for row in csv.DictReader(table)}
    for file, score in expected.items():
        frame = cv2.imread(str(tmp_path / 'data' / file), cv2.IMREAD_UNCHANGED)
        assert frame.dtype == np.uint16
        assert float(rows[file]['score']) == pytest.approx(score, abs=1e-3)
        assert model(frame).score == pytest.approx(score, abs=1e-3)


def test_published_configs_resize_as_ever():
    config = config_lib.default_config()
    assert (config.data.masks, config.data.range) == ('auto', 0)
    assert config_lib.load('auto').data.masks == config_lib.load('edge').data.masks == 'region'
