"""Predictions for any folder of images: what is written, what is refused, what is held."""

import csv
import errno
import gc
import io
import os
import pathlib
import pwd
import struct
from unittest import mock
import weakref
import zlib

import commands
import cv2
import numpy as np
from PIL import Image
import pytest
import tiny

from ssn_jax import config as config_lib, predict_folder, predictor, signals, terminal
from ssn_jax.data import images
from ssn_jax.errors import UserError


class Brightness(predictor.Predictor):
    """A model whose map is the image's brightness, and whose score is its maximum."""

    def logits(self, images):
        assert images.shape[1:] == (*self.config.image_size, 3) and len(images) <= self.batch_size
        maps = images.astype(np.float32).mean(-1) / 16 - 8
        return maps.max((1, 2)), maps


@pytest.fixture
def run():
    """Such a model of an opened run."""
    config = config_lib.default_config()
    config.update(image_size=(64, 64), eval_batch_size=4)
    return Brightness(config, None, 300, {'threshold': 0.0}, pathlib.Path('run'))


def spot(height, width, box, channels=3):
    """A dark image with a bright box (x, y, width, height)."""
    x, y, w, h = box
    image = np.full((height, width, channels), 20, np.uint8)
    image[y : y + h, x : x + w] = 240
    return image.squeeze()


def write(file, image):
    file.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(file), image)


def table(file):
    with file.open(newline='') as f:
        return {row['file']: row for row in csv.DictReader(f)}


def box_of(row):
    return tuple(int(row[name]) for name in ('x', 'y', 'width', 'height'))


WRITTEN = ['overlays', 'predictions.csv', 'predictions.json']
KINDS = {
    'grey.png': lambda image: image[..., 0],
    'grey16.png': lambda image: image[..., 0].astype(np.uint16) * 257,
    'colour16.png': lambda image: image.astype(np.uint16) * 257,
    'colour16.tiff': lambda image: image.astype(np.uint16) * 257,
    'alpha.png': lambda image: np.dstack([image, image[..., :1]]),
    'one bit.pbm': lambda image: image[..., 0] // 128 * 255,
    'umlaut ä.bmp': lambda image: image,
    'colour.jpg': lambda image: image,
    'colour.WEBP': lambda image: image,
    'sub/folder/colour.ppm': lambda image: image,
}


@pytest.mark.parametrize('size', [(128, 192), (300, 80)])
def test_any_format_and_size(size, run, tmp_path):
    box = (40, 60, 24, 36)
    for name, make in KINDS.items():
        write(tmp_path / 'in' / name, make(spot(*size, box)))
    write(tmp_path / 'in/dark.png', spot(*size, (0, 0, 0, 0)))
    (tmp_path / 'in/notes.txt').write_text('no image')
    (tmp_path / 'in/.hidden.png').write_text('no image')
    assert predict_folder.predict(run, tmp_path / 'in', tmp_path / 'out') == (len(KINDS) + 1, 0)
    rows = table(tmp_path / 'out/predictions.csv')
    assert set(rows) == {*KINDS, 'dark.png'}
    assert rows.pop('dark.png')['decision'] == 'normal'
    # A pixel of the map is size / 64 pixels of the image.
    slack = np.array([size[1], size[0]]) / 64 + 1
    for name, row in rows.items():
        assert row['decision'] == 'defective' and float(row['score']) > 0.9, name
        found = np.array(box_of(row))
        assert (np.abs(found[:2] - box[:2]) <= slack).all(), name
        assert (np.abs(found[2:] - box[2:]) <= 2 * slack).all(), name
        overlay = cv2.imread(str(tmp_path / 'out/overlays' / f'{name}.jpg'))
        assert overlay.shape == (*size, 3), name
        # Yellow where the map is high, blue where it is low.
        assert overlay[78, 52, 0] < overlay[78, 52, 2] and overlay[5, 5, 0] > overlay[5, 5, 2], name
        white = (overlay[..., 0].astype(int) > 200).sum()  # Blue lacks in the spot: the outline.
        assert 20 < white < 400, name
    assert sorted(os.listdir(tmp_path / 'out')) == WRITTEN


def save(file, image, **options):
    """Writes what OpenCV does not, with Pillow."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)


def test_every_other_kind_of_file(run, tmp_path, caplog):
    """The spot is found in what is an image; the rest is reported, each file in one line."""
    source, box = tmp_path / 'in', (40, 60, 24, 36)
    picture = Image.fromarray(spot(128, 192, box))
    turned = Image.Exif()
    turned[274] = 6  # To be turned by 90° clockwise.
    save(source / 'cmyk.jpg', picture.convert('CMYK'))
    save(source / 'palette.png', picture.convert('P'))
    save(source / 'palette alpha.png', picture.convert('P'), transparency=0)
    save(source / 'alpha.webp', picture.convert('RGBA'), lossless=True)
    save(source / 'grey alpha.png', picture.convert('LA'))
    save(source / 'one bit.png', picture.convert('1', dither=Image.Dither.NONE))
    save(source / 'exif.jpg', picture.transpose(Image.Transpose.ROTATE_90), exif=turned)
    save(source / '検査 Übung €.png', picture)
    good = {p.name for p in source.iterdir()}

    encoded = (source / 'palette.png').read_bytes()
    bad = {'empty.png': b'', 'cut.png': encoded[:-20], 'text.png': b'# Notes\n'}
    bad['cut.jpg'] = (source / 'cmyk.jpg').read_bytes()[:-200]
    for name, content in bad.items():
        (source / name).write_bytes(content)
    black, bad = Image.new('RGB', picture.size), {*bad, 'animated.gif'}
    save(source / 'animated.gif', picture, save_all=True, append_images=[black])
    (source / 'loop.png').symlink_to(source / 'loop.png')
    (source / 'folder.png').mkdir()  # Holds no image, and is none.
    (source / 'round').symlink_to(source)
    write(source / 'full.png/1.png', spot(128, 192, box))

    counts = len(good) + 1, len(bad) + 1
    assert predict_folder.predict(run, source, tmp_path / 'out') == counts
    rows = table(tmp_path / 'out/predictions.csv')
    assert rows.keys() == good | {'full.png/1.png'}
    for name, row in rows.items():
        assert row['decision'] == 'defective', name
        assert np.abs(np.array(box_of(row)) - box).max() <= 8, name
        overlay = cv2.imread(str(tmp_path / 'out/overlays' / f'{name}.jpg'))
        assert overlay.shape == (128, 192, 3), name
    assert table(tmp_path / 'out/unreadable.csv').keys() == {*bad, 'loop.png'}
    warned = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    assert len(warned) == len(bad) + 1 and not any('\n' in text for text in warned)


def test_no_name_leads_out_of_the_output(run, tmp_path):
    """Names are those of files and folders, and may be anything that these can be called."""
    source, outside = tmp_path / 'in', tmp_path / 'outside'
    write(outside / 'secret.png', spot(40, 40, (10, 10, 9, 9)))
    names = ['..png', '...png', ' .png', '-rf.png', '~.png', '$(touch x).png', 'a\nb.png']
    names += ['%2e.png', '..%2f..%2fx.png', 'C:\\x.png', '.. /x.png', '... /.. .png']
    names += ['predictions.csv/x.png']
    for name in names:
        write(tmp_path / 'in/x.png', spot(40, 40, (10, 10, 9, 9)))
        (source / name).parent.mkdir(exist_ok=True)
        (source / 'x.png').rename(source / name)
    (source / 'link.png').symlink_to(outside / 'secret.png')
    (source / 'folder').symlink_to(outside)
    before = {p: p.lstat().st_mtime_ns for p in (*source.rglob('*'), *outside.rglob('*'))}
    hidden = {name for name in names if name.startswith('.')}
    done, failed = predict_folder.predict(run, source, tmp_path / 'out')
    assert (done, failed) == (len(names) - len(hidden) + 2, 0)
    after = {p: p.lstat().st_mtime_ns for p in (*source.rglob('*'), *outside.rglob('*'))}
    assert after == before
    assert {p.name for p in tmp_path.iterdir()} == {'in', 'out', 'outside'}
    drawn = {p.relative_to(tmp_path / 'out/overlays') for p in (tmp_path / 'out').rglob('*.jpg')}
    expected = {f'{name}.jpg' for name in {*names, 'link.png', 'folder/secret.png'} - hidden}
    assert {p.as_posix() for p in drawn} == expected


# --- What ends it, and how it goes on -------------------------------------------------------------


def write_many(folder, count):
    """Images with a spot each, at another place."""
    for i in range(count):
        write(folder / f'{i:02d}.png', spot(40, 40, (i, 10, 9, 9)))


@pytest.fixture
def whole(run, tmp_path):
    """12 images in in/, and the content of the table of all of them."""
    write_many(tmp_path / 'in', 12)
    predict_folder.predict(run, tmp_path / 'in', tmp_path / 'whole')
    return (tmp_path / 'whole/predictions.csv').read_bytes()


def ends(monkeypatch, where, name, error, call):
    """Within the test the call of this number of `where.name` raises an error instead."""
    original, seen = getattr(where, name), []

    def changed(*arguments, **named):
        seen.append(arguments)
        if len(seen) == call:
            raise error
        return original(*arguments, **named)

    monkeypatch.setattr(where, name, changed)


@pytest.mark.parametrize('error', [KeyboardInterrupt, signals.HungUp, MemoryError])
def test_what_is_done_is_kept_and_gone_on_with(error, whole, run, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        ends(patch, run, 'logits', error(), 3)
        with pytest.raises(error) as raised:
            predict_folder.predict(run, tmp_path / 'in', tmp_path / 'out')
    table = tmp_path / 'out/predictions.csv'
    if error is not MemoryError:
        assert f'8 predictions are in {table}, the same command goes on' in str(raised.value)
    assert table.read_bytes() == b''.join(whole.splitlines(keepends=True)[:9])
    caplog.set_level('INFO')
    assert predict_folder.predict(run, tmp_path / 'in', tmp_path / 'out') == (4, 0)
    assert f'8 images are in {table} already, 4 are left' in caplog.text
    assert table.read_bytes() == whole
    assert predict_folder.predict(run, tmp_path / 'in', tmp_path / 'out') == (0, 0)
    assert 'nothing is left to do' in caplog.text and table.read_bytes() == whole
    assert len(list((tmp_path / 'out/overlays').iterdir())) == 12


def test_a_table_that_is_cut_off_anywhere_is_completed(whole, run, tmp_path):
    """In the heading, in a row, in a name with line breaks, between rows."""
    write(tmp_path / 'in/x.png', spot(40, 40, (10, 10, 9, 9)))
    (tmp_path / 'in/x.png').rename(tmp_path / 'in/99\n"a\r\n,b".png')
    predict_folder.predict(run, tmp_path / 'in', tmp_path / 'all', overlays=False)
    expected = (tmp_path / 'all/predictions.csv').read_bytes()
    assert expected.startswith(whole)
    table = tmp_path / 'all/predictions.csv'
    for end in (0, 5, len(whole) // 2, len(whole) - 3, *range(len(whole), len(expected))):
        table.write_bytes(expected[:end])
        predict_folder.predict(run, tmp_path / 'in', tmp_path / 'all', overlays=False)
        assert table.read_bytes() == expected, end
    table.write_bytes(expected.replace(b'03.png', b'03.png,'))
    with pytest.raises(UserError, match=r'predictions\.csv is damaged'):
        predict_folder.predict(run, tmp_path / 'in', tmp_path / 'all', overlays=False)


def other_threshold(run, folder):
    run.threshold = 0.5
    return 'different: threshold; threshold is 0.0 there and 0.5 here'


def other_run(run, folder):
    run.workdir = pathlib.Path('another')
    return "run is 'run' there and 'another' here"


def other_input(run, folder):
    (folder / 'in').rename(folder / 'moved')
    (folder / 'in').symlink_to(folder / 'moved')
    return 'different: input'


def changed_image(run, folder):
    write(folder / 'in/03.png', spot(40, 40, (30, 30, 9, 9)))
    return '03.png has changed since .*predictions.csv was written'


def no_former_prediction(run, folder):
    (folder / 'whole/predictions.json').unlink()
    return 'is not empty'


CHANGES = [other_threshold, other_run, other_input, changed_image, no_former_prediction]


@pytest.mark.parametrize('change', CHANGES)
def test_nothing_is_added_to_other_predictions(change, whole, run, tmp_path):
    words = change(run, tmp_path)
    with pytest.raises(UserError, match=words) as raised:
        predict_folder.predict(run, tmp_path / 'in', tmp_path / 'whole')
    assert str(raised.value).count('choose another --output') == 1
    assert (tmp_path / 'whole/predictions.csv').read_bytes() == whole


def test_what_could_not_be_read_is_tried_again_and_what_is_new_is_added(run, tmp_path):
    write_many(tmp_path / 'in', 3)
    good = (tmp_path / 'in/01.png').read_bytes()
    (tmp_path / 'in/01.png').write_bytes(good[:50])
    assert predict_folder.predict(run, tmp_path / 'in', tmp_path / 'out') == (2, 1)
    assert predict_folder.predict(run, tmp_path / 'in', tmp_path / 'out') == (0, 1)
    assert [*table(tmp_path / 'out/unreadable.csv')] == ['01.png']
    (tmp_path / 'in/01.png').write_bytes(good)
    write(tmp_path / 'in/00b.png', spot(40, 40, (10, 10, 9, 9)))
    assert predict_folder.predict(run, tmp_path / 'in', tmp_path / 'out') == (2, 0)
    assert [*table(tmp_path / 'out/predictions.csv')] == ['00.png', '02.png', '00b.png', '01.png']
    assert not (tmp_path / 'out/unreadable.csv').exists()


def test_pictures_that_cannot_be_written_cost_no_row(run, tmp_path, caplog):
    """Names that are too long with what is added to them, and a file where a folder must be."""
    names = ['a' * 240 + '.png', 'b' * 248 + '.png', 'c.png', 'c.png.jpg/x.png', 'd.png']
    for name in names:
        write(tmp_path / 'in/x.png', spot(40, 40, (10, 10, 9, 9)))
        (tmp_path / 'in' / name).parent.mkdir(exist_ok=True)
        (tmp_path / 'in/x.png').rename(tmp_path / 'in' / name)
    found = predict_folder.predict(run, tmp_path / 'in', tmp_path / 'out', maps='png')
    assert found == (5, 0)
    assert [*table(tmp_path / 'out/predictions.csv')] == names
    reasons = table(tmp_path / 'out/unwritten.csv')
    clash = reasons.keys() - {names[1]}
    assert len(reasons) == 2 and clash <= {'c.png', 'c.png.jpg/x.png'}
    assert reasons[names[1]]['reason'].count('cannot be written (File name too long)') == 3
    assert all('overlays/' in reasons[name]['reason'] for name in clash)
    assert not any('maps/' in reasons[name]['reason'] for name in clash)
    assert len(list((tmp_path / 'out/masks').rglob('*.png'))) == 4
    assert caplog.text.count('cannot be written') >= 2


@pytest.mark.parametrize('what, rows', [('overlay', 6), ('row', 5), ('half a row', 5)])
def test_a_full_disk_ends_it_after_whole_rows(what, rows, whole, run, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as patch:
        store, opened = predict_folder._store, pathlib.Path.open

        def fails(path, content):
            if what == 'overlay' and path.name == '06.png.jpg':
                raise full
            store(path, content)

        class Full(io.FileIO):
            """A file on a disk with room for five rows, or five and a half."""

            def write(self, content):
                if content.startswith(b'05') and what == 'half a row':
                    return super().write(content[:9])
                if what != 'overlay' and content[:2] not in b'fi 00 01 02 03 04'.split():
                    raise full
                return super().write(content)

        patch.setattr(predict_folder, '_store', fails)
        patch.setattr(
            *(pathlib.Path, 'open'),
            lambda self, mode='r', **more: (
                Full(self, 'a') if mode == 'ab' else opened(self, mode, **more)
            ),
        )
        with pytest.raises(UserError, match=r'\(No space left on device\): make room'):
            predict_folder.predict(run, tmp_path / 'in', tmp_path / 'out')
    table = tmp_path / 'out/predictions.csv'
    assert table.read_bytes() == b''.join(whole.splitlines(keepends=True)[: 1 + rows])
    predict_folder.predict(run, tmp_path / 'in', tmp_path / 'out')
    assert table.read_bytes() == whole


# --- Maps and masks -------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [(130, 190), (40, 20)])
@pytest.mark.parametrize('overlays', [True, False])
def test_maps_and_masks_are_of_the_size_of_their_image(size, overlays, run, tmp_path):
    box = (size[1] // 2, size[0] // 3, size[1] // 4, size[0] // 4)
    write(tmp_path / 'in/a/spot.png', spot(*size, box))
    write(tmp_path / 'in/dark.png', spot(*size, (0, 0, 0, 0)))
    for kind in ('png', 'npy'):
        predict_folder.predict(run, tmp_path / 'in', tmp_path / kind, overlays=overlays, maps=kind)
        assert (tmp_path / kind / 'overlays').exists() == overlays
    logits = np.load(tmp_path / 'npy/maps/a/spot.png.npy')
    assert logits.shape == size and logits.dtype == np.float32
    image = cv2.imread(str(tmp_path / 'in/a/spot.png'))
    expected = run(image).full_map()
    assert np.array_equal(logits, expected)
    levels = cv2.imread(str(tmp_path / 'png/maps/a/spot.png.png'), cv2.IMREAD_UNCHANGED)
    assert levels.shape == size and levels.dtype == np.uint16
    assert np.abs(levels / 65535 - 1 / (1 + np.exp(-expected))).max() < 1e-5
    masks = [cv2.imread(str(tmp_path / x / 'masks/a/spot.png.png'), -1) for x in ('png', 'npy')]
    assert np.array_equal(*masks) and masks[0].shape == size and {*masks[0].flat} == {0, 255}
    row = table(tmp_path / 'png/predictions.csv')['a/spot.png']
    assert cv2.boundingRect(masks[0]) == box_of(row)
    dark = cv2.imread(str(tmp_path / 'png/masks/dark.png.png'), cv2.IMREAD_UNCHANGED)
    assert dark.shape == size and not dark.any()


def test_an_image_of_one_pixel(run, tmp_path):
    write(tmp_path / 'dot.png', np.full((1, 1, 3), 255, np.uint8))
    assert predict_folder.predict(run, tmp_path / 'dot.png', tmp_path / 'out') == (1, 0)
    row = table(tmp_path / 'out/predictions.csv')['dot.png']
    assert box_of(row) == (0, 0, 1, 1) and row['decision'] == 'defective'
    assert cv2.imread(str(tmp_path / 'out/overlays/dot.png.jpg')).shape == (1, 1, 3)


def test_a_run_that_cuts_images_finds_boxes_in_what_is_left(run, tmp_path):
    run.config.resize = (128, 80)  # The map covers rows 32 to 96 and columns 8 to 72 of it.
    write(tmp_path / 'in/a.png', spot(256, 240, (90, 100, 48, 32)))
    predict_folder.predict(run, tmp_path / 'in', tmp_path / 'out')
    found = box_of(table(tmp_path / 'out/predictions.csv')['a.png'])
    assert np.abs(np.array(found) - (90, 100, 48, 32)).max() <= 6
    overlay = cv2.imread(str(tmp_path / 'out/overlays/a.png.jpg')).astype(int)
    colourful = np.ptp(overlay, axis=-1) > 30
    assert colourful[70:186, 30:210].mean() > 0.8 and not colourful[:56].any()
    assert not colourful[:, :16].any()


def huge_png(file, height, width):
    """The header of a PNG, and nothing of its pixels."""

    def part(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', crc)

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    data = part(b'IHDR', header) + part(b'IDAT', zlib.compress(bytes(100))) + part(b'IEND', b'')
    file.write_bytes(b'\x89PNG\r\n\x1a\n' + data)


def test_what_can_not_be_read_stops_nothing(run, tmp_path, monkeypatch, caplog):
    source = tmp_path / 'in'
    for i in range(9):
        write(source / f'{i}.png', spot(40, 40, (10, 10, 9, 9)))
    (source / '3.png').write_bytes((source / '4.png').read_bytes()[:60])
    (source / '5.jpg').write_text('no image')
    (source / '6.tif').write_bytes(b'')
    huge_png(source / '7.huge.png', 40_000, 40_000)
    (source / '8.gone.png').symlink_to(source / 'nowhere')
    decode = mock.Mock(wraps=images.decode)
    monkeypatch.setattr(images, 'decode', decode)
    assert predict_folder.predict(run, source, tmp_path / 'out') == (8, 5)
    assert '7.huge.png' not in {call.args[1].name for call in decode.call_args_list}
    assert [*table(tmp_path / 'out/predictions.csv')] == [f'{i}.png' for i in range(9) if i != 3]
    reasons = table(tmp_path / 'out/unreadable.csv')
    assert [*reasons] == ['3.png', '5.jpg', '6.tif', '7.huge.png', '8.gone.png']
    assert '40000x40000' in reasons['7.huge.png']['reason']
    assert 'No such file' in reasons['8.gone.png']['reason']
    warned = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    assert warned == [row['reason'] for row in reasons.values()]


@pytest.mark.parametrize('overlays', [True, False])
@pytest.mark.parametrize('shape, chunk', [((20, 30), 4), ((600, 600), 2)])
def test_memory_does_not_grow_with_the_number_of_images(
    shape, chunk, overlays, run, tmp_path, monkeypatch
):
    """Held are at most two chunks that are loaded or predicted, and one that is drawn."""
    monkeypatch.setattr(predict_folder, '_CHUNK_PIXELS', 2 * 600 * 600)
    for i in range(41):
        write(tmp_path / f'in/{i:02d}.png', np.zeros((*shape, 3), np.uint8))
    held, most, decode, threads = [], [], images.decode, cv2.getNumThreads()

    def counted(encoded, file, *more, **white):
        image = decode(encoded, file, *more, **white)
        held.append(weakref.ref(image))
        most.append(sum(x() is not None for x in held))
        return image

    monkeypatch.setattr(images, 'decode', counted)
    gc.disable()  # Nothing may need the collector.
    try:
        found = predict_folder.predict(run, tmp_path / 'in', tmp_path / 'out', overlays=overlays)
    finally:
        gc.enable()
    assert found == (41, 0)
    assert len(held) == 41 and max(most) <= chunk * (3 if overlays else 2)
    assert cv2.getNumThreads() == threads


def test_rows_and_overlays_are_those_of_their_images(run, tmp_path):
    """Whatever the order in which threads end: images of very different sizes, in many chunks."""
    boxes = {}
    for i in range(23):
        side, name = (900, 40, 90)[i % 3], f'{i:02d}.png'
        boxes[name] = (i * side // 60, side // 3, side // 4, side // 4)
        write(tmp_path / 'in' / name, spot(side, side, boxes[name]))
    assert predict_folder.predict(run, tmp_path / 'in', tmp_path / 'out') == (23, 0)
    rows = table(tmp_path / 'out/predictions.csv')
    assert [*rows] == [*boxes]
    for name, (x, y, w, h) in boxes.items():
        drawn = cv2.imread(str(tmp_path / 'out/overlays' / f'{name}.jpg')).astype(int)
        slack = len(drawn) / 64 + 1
        assert (np.abs(np.array(box_of(rows[name])) - (x, y, w, h)) <= 2 * slack).all(), name
        inside = drawn[y + h // 2, x + w // 2]
        assert inside[2] > inside[0], name  # Yellow.


HEADERS = {  # Without their pixels, of 40,000 x 30,000.
    'a.hdr': b'#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 30000 +X 40000\n',
    'a.pam': b'P7\nWIDTH 40000\nHEIGHT 30000\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n',
    'a.exr': b'v/1\x01\x02\0\0\0dataWindow\0box2i\0\x10\0\0\0'
    + np.array([-1, 0, 39_998, 29_999], '<i4').tobytes(),
}


@pytest.mark.parametrize('name', HEADERS)
def test_the_size_of_files_that_pillow_does_not_know(name, tmp_path):
    assert images.size(HEADERS[name]) == (30_000, 40_000)
    with pytest.raises(UserError, match='30000x40000'):
        images.decode(HEADERS[name], name)
    (tmp_path / name).write_bytes(HEADERS[name])
    assert images.size(tmp_path / name) == (30_000, 40_000)


def test_the_strongest_region_is_that_of_the_highest_logit():
    """Where float32 probabilities are all 1."""
    logits = np.full((20, 30), -9.0, np.float32)
    logits[2:5, 3:6], logits[10:14, 20:25] = 17.0, 25.0
    config = config_lib.default_config()
    config.image_size = (20, 30)
    view = predictor.View(config, (40, 30))
    regions, marked = predictor.find_regions(logits, view)
    assert regions == [(20, 20, 5, 8, 40, 25.0), (3, 4, 3, 6, 18, 17.0)]
    assert marked.sum() == 9 + 20


def test_predictions_inside_the_input_are_not_predicted(run, tmp_path):
    write(tmp_path / 'a.png', spot(40, 40, (10, 10, 9, 9)))
    assert predict_folder.predict(run, tmp_path, tmp_path / 'out') == (1, 0)
    run.threshold = 9.0
    assert predict_folder.predict(run, tmp_path, tmp_path / 'out2') == (2, 0)
    assert table(tmp_path / 'out2/predictions.csv')['a.png']['decision'] == 'normal'


def no_threshold(run):
    run.decision, run.threshold = {'undefined': 'scores are not finite'}, None
    return 'scores are not finite'


def diverged(run):
    nothing = np.full((1, 64, 64), np.nan, np.float32)
    run.logits = lambda images: (nothing[:, 0, 0], nothing)
    return 'diverged'


@pytest.mark.parametrize('change', [no_threshold, diverged])
def test_a_bad_run_is_one_line_and_leaves_nothing(change, run, tmp_path):
    write(tmp_path / 'in/0.png', spot(40, 40, (10, 10, 9, 9)))
    words = change(run)
    before = {p for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(UserError, match=words) as raised:
        predict_folder.predict(run, tmp_path / 'in', tmp_path / 'out')
    assert '\n' not in str(raised.value)
    assert {p for p in tmp_path.rglob('*') if p.is_file()} == before


@pytest.mark.parametrize(
    'where, why', [('', ''), ('file', 'Not a directory'), (None, 'the user has no home folder')]
)
def test_programs_are_kept_where_that_can_be(where, why, tmp_path, monkeypatch, caplog):
    (tmp_path / 'file').write_text('')
    for name in ('HOME', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, 'getpwuid', {}.__getitem__)
    if where is not None:
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / where))
    found = terminal.compilation_cache()
    assert found.get('jax_compilation_cache_dir') == (
        None if why else str(tmp_path / 'ssn_jax/compiled')
    )
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == bool(why) and all(why in text for text in said)
    if not why:
        full = OSError(errno.ENOSPC, 'No space left on device')
        monkeypatch.setattr(os, 'posix_fallocate', mock.Mock(side_effect=full))
        assert terminal.compilation_cache() == {}
        assert 'ssn_jax/compiled cannot be used (No space left on device)' in caplog.text


@pytest.mark.slow
def test_the_command(tmp_path):
    """One unreadable file: exit status 2; what was compiled once is not compiled again."""
    workdir = tiny.fake_run(tmp_path, threshold=-0.3)
    tiny.write_data(tmp_path / 'data', train=0, test=2)
    source = tmp_path / 'data/nut/test'

    def command(output):
        return commands.start(
            *('predict', '--workdir', workdir, '--input', source, '--output', tmp_path / output),
            *('--engine', 'xla'),
            cwd=tmp_path,
            XDG_CACHE_HOME=str(tmp_path / 'home'),
        )

    first = command('first')
    assert first.end() == 0, first.err
    assert '\r' not in first.err and '4 predictions are in' in first.out
    # Names of what is cached; its times of use are files as well.
    kept = {p.name for p in (tmp_path / 'home/ssn_jax/compiled').glob('*-cache')}
    assert kept
    (source / 'good/000.png').write_text('no image')
    second = command('second')
    assert second.end() == 2, second.err
    assert '1 of 4 images could not be read.' in second.err
    assert 'Traceback' not in second.err
    assert {p.name for p in (tmp_path / 'home/ssn_jax/compiled').glob('*-cache')} == kept
    rows = [table(tmp_path / x / 'predictions.csv') for x in ('first', 'second')]
    assert len(rows[0].pop('good/000.png')) == 11 and rows[0] == rows[1]
    assert {row['decision'] for row in rows[0].values()} <= {'normal', 'defective'}


def test_a_squashed_image_is_told_once(run, tmp_path, caplog):
    for i, size in enumerate([(40, 40), (40, 70), (20, 90)]):
        write(tmp_path / f'in/{i}.png', spot(*size, (1, 1, 9, 9)))
    run.config.image_size = (32, 32)
    predict_folder.predict(run, tmp_path / 'in', tmp_path / 'out')
    told = [r.getMessage() for r in caplog.records if 'squashed' in r.getMessage()]
    assert len(told) == 1 and told[0].startswith('1.png')
    caplog.clear()
    run.config.fit = 'pad'
    predict_folder.predict(run, tmp_path / 'in', tmp_path / 'padded')
    assert 'squashed' not in caplog.text
