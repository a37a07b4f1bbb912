"""The data sets: layouts, decoding, the prepared cache, and every mistake a user can make."""

from collections import Counter
import os
from pathlib import Path
import pwd
import subprocess
import sys
import tempfile

import cv2
import ml_collections
import numpy as np
import pytest
from tensorflow_datasets.core import shuffle

from ssn_jax import data
from ssn_jax.data import builders, images, records
from ssn_jax.errors import UserError

SIZE = (12, 10)  # height, width


@pytest.fixture
def load(tmp_path):
    """Loads a data set below tmp_path/root, with its own cache."""

    def load(name='mvtec_ad', root=tmp_path / 'root', category='nut', size=SIZE, **fields):
        config = {
            'name': name,
            'root': str(root),
            'category': category,
            'cache': str(tmp_path / 'cache'),
            'seed': 0,
        }
        return data.load(ml_collections.ConfigDict(config | fields), size)

    return load


def write(file: Path, value, size=SIZE):
    """Writes an image: one value everywhere, or an array."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = value if isinstance(value, np.ndarray) else np.full((*size, 3), value, np.uint8)
    assert cv2.imwrite(str(file), image)


def half_mask(size=SIZE, value=255):
    mask = np.zeros(size, np.uint8)
    mask[: size[0] // 2] = value
    return mask


def make_category(base: Path):
    """A tiny category: 3 normal images to train on, 2 normal and 2 defective ones to test."""
    for number in (2, 0, 1):
        write(base / f'train/good/{number:03d}.png', 10 + number)
    write(base / 'test/good/000.png', 20)
    write(base / 'test/good/001.png', 21)
    for number, defect in enumerate(('scratch', 'dent')):
        write(base / f'test/{defect}/000.png', 30 + number)
        write(base / f'ground_truth/{defect}/000_mask.png', half_mask())


def make_ksdd2(root: Path):
    """Two training images, one of them defective, and one normal test image."""
    for split, name, value in (('train', '10', 0), ('train', '11', 1), ('test', '20', 0)):
        write(root / split / f'{name}.png', 40 + int(name))
        write(root / split / f'{name}_GT.png', half_mask(value=value))


def fails(load, **fields) -> str:
    """Returns the message, one line, of the UserError that a load ends with."""
    with pytest.raises(UserError) as caught:
        load(**fields)
    message = str(caught.value)
    assert '\n' not in message
    return message


# Layouts


def test_mvtec_ad(load, tmp_path):
    make_category(tmp_path / 'root/nut')
    (tmp_path / 'root/nut/train/good/Thumbs.db').write_text('no image')
    (tmp_path / 'root/nut/train/good/._000.png').write_text('no image')
    dataset = load()

    train, test = dataset.train, dataset.test
    assert (dataset.name, dataset.category, dataset.embedded) == ('mvtec_ad', 'nut', False)
    assert train.files == tuple(f'nut/train/good/00{n}.png' for n in range(3))
    assert train.images[:, 0, 0, 0].tolist() == [10, 11, 12]
    assert test.defects == ('dent', 'good', 'good', 'scratch')
    assert test.labels.tolist() == [1, 0, 0, 1]
    assert test.images[:, 0, 0, 0].tolist() == [31, 20, 21, 30]
    for split in (train, test):
        n = len(split.files)
        assert split.images.shape == (n, *SIZE, 3)
        assert split.masks.shape == (n, *SIZE)
        assert (split.images.dtype, split.masks.dtype) == (np.uint8, np.uint8)
        assert (split.has_mask.dtype, split.labels.dtype) == (bool, np.int32)
        assert split.has_mask.all()
    assert (test.masks[0] == half_mask(value=1)).all()
    assert not test.masks[1:3].any() and not train.masks.any()


def test_folder_without_masks(load, tmp_path, caplog):
    root = tmp_path / 'root'
    make_category(root)
    write(root / 'train/dent/007.png', 50)
    write(root / 'test/stain/a.jpg', 60)
    write(root / 'ground_truth/dent/008_mask.png', half_mask())  # Of no image, which is told.
    dataset = load('folder')
    told = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    assert len(told) == 1 and '(ground_truth/dent/008_mask.png)' in told[0]

    assert (dataset.name, dataset.category) == ('folder', 'root')
    assert dataset.train.defects == ('dent', 'good', 'good', 'good')
    assert dataset.train.has_mask.tolist() == [False, True, True, True]
    assert dataset.test.defects == ('dent', 'good', 'good', 'scratch', 'stain')
    assert dataset.test.has_mask.tolist() == [True, True, True, True, False]
    assert not dataset.test.masks[4].any()
    assert dataset.test.labels.tolist() == [1, 0, 0, 1, 1]


def test_folder_prefers_the_mask_that_names_its_split(load, tmp_path):
    root = tmp_path / 'root'
    make_category(root)
    write(root / 'train/dent/000.png', 50)
    write(root / 'ground_truth/train/dent/000_mask.png', 255 - half_mask())
    dataset = load('folder')
    assert (dataset.train.masks[0] == 1 - half_mask(value=1)).all()
    assert (dataset.test.masks[0] == half_mask(value=1)).all()


def test_ksdd2(load, tmp_path):
    root = tmp_path / 'root'
    make_ksdd2(root)
    write(root / 'train/11_GT (copy).png', 0)
    dataset = load('ksdd2', category='ignored')
    assert dataset.category == 'ksdd2'
    assert dataset.train.files == ('train/11.png', 'train/10.png')  # by defect, then by name
    assert dataset.train.defects == ('defect', 'good')
    assert dataset.train.labels.tolist() == [1, 0]
    assert dataset.train.masks.sum((1, 2)).tolist() == [60, 0]
    assert dataset.test.labels.tolist() == [0]
    assert dataset.test.has_mask.all()


# Decoding and resizing


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.bmp', '.tiff', '.webp', '.ppm', '.pam'])
def test_decode_gives_the_bits_of_imread(suffix):
    """Those of OpenCV's colours, blue first, turned round; JPEG is decoded as RGB at once."""
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    pictures = [cv2.resize(image, (91, 61), interpolation=cv2.INTER_CUBIC)]
    pictures += [image[..., :1]] * (suffix != '.ppm')
    pictures += [np.dstack([image, image[..., 0]])] * (suffix == '.png')  # With alpha.
    for picture in pictures:
        encoded = cv2.imencode(suffix, picture)[1]
        expected = cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1]
        assert (images.decode(encoded.tobytes(), f'a{suffix}') == expected).all()


def test_jpeg_rings_are_no_defect():
    mask = np.zeros((64, 64), np.uint8)
    mask[20:41, 20:41] = 255
    encoded = cv2.imencode('.jpg', mask, [cv2.IMWRITE_JPEG_QUALITY, 60])[1].tobytes()
    assert (images.decode_mask(encoded, 'a.jpg') == mask // 255).all()


def test_one_prepared_set_serves_every_size(load, tmp_path):
    make_category(tmp_path / 'root/nut')
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    write(tmp_path / 'root/nut/test/dent/000.png', picture)
    write(tmp_path / 'root/nut/ground_truth/dent/000_mask.png', half_mask((9, 7)))
    for size in ((16, 24), (5, 3)):
        test = load(size=size).test
        bgr = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_LINEAR)
        mask = cv2.resize(half_mask((9, 7), 1), size[::-1], interpolation=cv2.INTER_NEAREST)
        assert test.images.shape == (4, *size, 3)
        assert (test.images[0] == bgr[..., ::-1]).all()
        assert (test.masks[0] == mask).all()
        assert len(list((tmp_path / 'cache').iterdir())) == 1


# The cache


def test_prepared_set_is_read_again_and_never_stale(load, tmp_path):
    make_category(tmp_path / 'root/nut')
    first = load()
    prepared = set((tmp_path / 'cache').iterdir())
    again = load()
    assert set((tmp_path / 'cache').iterdir()) == prepared
    assert (again.test.images == first.test.images).all()
    assert again.test.files == first.test.files

    changed = tmp_path / 'root/nut/train/good/001.png'
    before = changed.stat()
    write(changed, 99)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert load().train.images[1, 0, 0, 0] == 99
    changed.unlink()
    assert load().train.files == ('nut/train/good/000.png', 'nut/train/good/002.png')


@pytest.mark.parametrize('damage', ['flip', 'cut', 'remove', 'older', 'null', '{}'])
def test_a_damaged_prepared_set_is_made_again(damage, load, tmp_path, caplog):
    make_category(tmp_path / 'root/nut')
    first = load()
    [prepared] = (tmp_path / 'cache').iterdir()
    file = max((p for p in prepared.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    if damage in ('older', 'null', '{}'):  # The older ones had no digests.
        file = prepared / 'sha256.json'
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if damage in ('flip', 'cut'):
        file.write_bytes(content if damage == 'flip' else content[:-1])
    elif damage in ('null', '{}'):
        file.write_text(damage)
    again = load()
    assert (again.train.images == first.train.images).all()
    assert (again.test.masks == first.test.masks).all()
    [warned] = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    assert 'is prepared anew' in warned and str(prepared) in warned
    assert [*(tmp_path / 'cache').iterdir()] == [prepared]
    load()
    assert caplog.text.count('is prepared anew') == 1


def test_an_image_that_is_too_large_is_not_decoded(load, tmp_path, monkeypatch):
    """As prediction does it; the limit is made small here."""
    make_category(tmp_path / 'root/nut')
    write(tmp_path / 'root/nut/train/good/003.png', 5, (80, 90))
    monkeypatch.setattr(images.pixels, '__defaults__', (80 * 89,))
    with pytest.raises(UserError, match=r'003\.png: 80x90'):
        load()


def test_no_name_leads_out_of_the_cache(load, tmp_path):
    make_category(tmp_path / 'root/nut')
    base, outside = tmp_path / 'root/nut', tmp_path / 'outside'
    write(outside / 'x.png', 7)
    for name in ('a\nb.png', '-rf.png', '$(touch x).png', '%2e%2e%2fx.png', 'C:\\x.png', ' .png'):
        (base / 'train/good/x.png').write_bytes((outside / 'x.png').read_bytes())
        (base / 'train/good/x.png').rename(base / 'train/good' / name)
    (base / 'train/good/link.png').symlink_to(outside / 'x.png')
    (base / 'test/.. ').symlink_to(outside)  # No defect of it has a mask, so it is not MVTec's.
    before = {p: p.lstat().st_mtime_ns for p in (*base.rglob('*'), *outside.rglob('*'))}
    found = load('folder', root=base)
    assert len(found.train.files) == 10 and (found.train.images == 7).any()
    assert {p.name for p in tmp_path.iterdir()} == {'root', 'outside', 'cache'}
    assert before == {p: p.lstat().st_mtime_ns for p in (*base.rglob('*'), *outside.rglob('*'))}
    assert {p.name[:11] for p in (tmp_path / 'cache').iterdir()} == {'folder-nut-'}


def test_two_roots_do_not_meet_in_the_cache(load, tmp_path):
    for value, name in ((1, 'a'), (2, 'b')):
        make_category(tmp_path / name / 'nut')
        write(tmp_path / name / 'nut/train/good/000.png', value)
        for file in (tmp_path / name).rglob('*.png'):
            os.utime(file, (0, 0))
    assert load(root=tmp_path / 'a').train.images[0, 0, 0, 0] == 1
    assert load(root=tmp_path / 'b').train.images[0, 0, 0, 0] == 2


def test_a_set_of_any_size_is_prepared(load, tmp_path, monkeypatch):
    """TFDS's shuffler would take TensorFlow for more than 1 GB of it."""
    monkeypatch.setattr(shuffle, 'MAX_MEM_BUFFER_SIZE', 10)
    make_category(tmp_path / 'root/nut')
    assert load().test.labels.tolist() == [1, 0, 0, 1]


def test_two_processes_prepare_at_once(tmp_path):
    make_category(tmp_path / 'root/nut')
    script = (
        'import sys, ml_collections\n'
        'from ssn_jax import data\n'
        'from ssn_jax.data import builders\n'
        "print('ready', flush=True); sys.stdin.readline()\n"
        f"config = dict(name='mvtec_ad', root={str(tmp_path / 'root')!r}, category='nut',\n"
        f'              cache={str(tmp_path / "cache")!r}, seed=0)\n'
        'print(data.load(ml_collections.ConfigDict(config), (8, 8)).test.labels.tolist())\n'
    )
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    command = [sys.executable, '-c', script]
    running = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    for process in running:
        assert process.stdout.readline() == 'ready\n'
    for process in running:
        process.stdin.write('\n')
        process.stdin.flush()
    for process in running:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert output == '[1, 0, 0, 1]\n'  # and not a word of TFDS
    assert len(list((tmp_path / 'cache').iterdir())) == 1


def test_the_slower_of_two_takes_what_the_faster_made(load, tmp_path, monkeypatch):
    make_category(tmp_path / 'root/nut')
    build = records._build

    def overtaken(source, folder):
        build(source, folder)
        monkeypatch.setattr(records, '_build', build)
        load()

    monkeypatch.setattr(records, '_build', overtaken)
    assert load().test.labels.tolist() == [1, 0, 0, 1]
    assert len(list((tmp_path / 'cache').iterdir())) == 1


def test_interruption_leaves_nothing(load, tmp_path, monkeypatch):
    make_category(tmp_path / 'root/nut')
    seen = []

    def interrupted(record):
        seen.append(record)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return example(record)

    example = builders.example
    monkeypatch.setattr(builders, 'example', interrupted)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert not list((tmp_path / 'cache').iterdir())
    monkeypatch.undo()
    assert len(load().train.files) == 3


def test_default_cache_folder(load, tmp_path, monkeypatch):
    make_category(tmp_path / 'root/nut')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    load(cache='')
    assert [path.name[:13] for path in (tmp_path / 'xdg/ssn_jax').iterdir()] == ['mvtec_ad-nut-']


def test_unwritable_cache(load, tmp_path):
    make_category(tmp_path / 'root/nut')
    (tmp_path / 'file').write_text('')
    message = fails(load, cache=str(tmp_path / 'file/cache'))
    assert str(tmp_path / 'file/cache') in message
    assert '--config.data.cache' in message


@pytest.mark.parametrize('home', [False, True])
def test_without_a_cache_the_data_are_prepared_in_a_temporary_folder(
    home, load, tmp_path, monkeypatch, caplog
):
    """No home for the user's id, or a cache that cannot be written; nothing is left behind."""
    make_category(tmp_path / 'root/nut')
    expected = load()
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
    (tmp_path / 'temporary').mkdir()
    for name in ('HOME', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    if home:
        monkeypatch.setenv('HOME', str(tmp_path / 'file'))
    else:
        monkeypatch.setattr(pwd, 'getpwuid', {}.__getitem__)
    found = load(cache='')
    assert np.array_equal(found.train.images, expected.train.images)
    reason = r'Not a directory' if home else 'the user has no home folder'
    [said] = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    assert f'The cache cannot be written ({reason}): the data are prepared in' in said
    assert not list((tmp_path / 'temporary').iterdir())


def test_needs_no_tensorflow(tmp_path):
    make_category(tmp_path / 'root')
    script = (
        'import sys, ml_collections\n'
        'from ssn_jax import data\n'
        "assert 'tensorflow_datasets' not in sys.modules\n"
        f"config = dict(name='folder', root={str(tmp_path / 'root')!r}, category='',\n"
        f'              cache={str(tmp_path / "cache")!r}, seed=0)\n'
        'data.load(ml_collections.ConfigDict(config), (8, 8))\n'
        "loaded = {'tensorflow', 'pandas', 'importlib_resources'} & set(sys.modules)\n"
        'assert not loaded, loaded\n'
    )
    command = [sys.executable, '-c', script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ''


# Mistakes. Each case breaks a good folder and names what the message must contain.


def unlink(*names):
    return lambda root: [(root / name).unlink() for name in names]


def truncate(name):
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:20])


def add(name, value=5, size=SIZE):
    return lambda root: write(root / name, value, size)


MVTEC_MISTAKES = {
    'no train/good': (
        lambda root: (root / 'nut/train').rename(root / 'nut/training'),
        'nut/train/good: does not exist',
    ),
    'empty train/good': (
        unlink(*[f'nut/train/good/00{n}.png' for n in range(3)]),
        'nut/train/good: holds no images',
    ),
    'broken image': (truncate('nut/train/good/001.png'), 'nut/train/good/001.png: does not decode'),
    'empty file': (
        lambda root: (root / 'nut/test/good/001.png').write_bytes(b''),
        'nut/test/good/001.png: does not decode',
    ),
    'broken mask': (
        truncate('nut/ground_truth/dent/000_mask.png'),
        'ground_truth/dent/000_mask.png: does not decode',
    ),
    'mask of another size': (
        add('nut/ground_truth/dent/000_mask.png', half_mask((6, 10))),
        'ground_truth/dent/000_mask.png: the mask is 6x10 (height by width), its image 12x10',
    ),
    'no mask': (
        unlink('nut/ground_truth/dent/000_mask.png'),
        'test/dent/000.png: a defect without its mask; add',
    ),
    'two masks': (
        add('nut/ground_truth/dent/000_mask.bmp'),
        'ground_truth/dent/000_mask.png: duplicate name',
    ),
}

FOLDER_MISTAKES = {
    'two images, one mask': (add('test/dent/000.jpg'), 'test/dent/000.jpg: two images'),
    'one mask for two splits': (add('train/dent/000.png'), 'test/dent/000.png: duplicate name'),
    'mask under another name': (
        lambda root: (root / 'ground_truth/dent/000_mask.png').rename(
            root / 'ground_truth/dent/mask_of_000.png'
        ),
        'ground_truth/dent/mask_of_000.png: belongs to no image',
    ),
}

KSDD2_MISTAKES = {
    'two images of a name': (add('train/10.bmp'), 'train/10.png: duplicate name, 10.bmp'),
    'two masks of a name': (
        add('train/10_GT.bmp', half_mask()),
        'train/10_GT.png: duplicate name, 10_GT.bmp',
    ),
    'no mask': (unlink('train/10_GT.png'), 'train/10.png: has no mask'),
}


@pytest.mark.parametrize(
    ('name', 'make', 'spoil', 'expected'),
    [
        pytest.param(name, make, *mistake, id=f'{name}, {title}')
        for name, make, mistakes in (
            ('mvtec_ad', lambda root: make_category(root / 'nut'), MVTEC_MISTAKES),
            ('folder', make_category, FOLDER_MISTAKES),
            ('ksdd2', make_ksdd2, KSDD2_MISTAKES),
        )
        for title, mistake in mistakes.items()
    ],
)
def test_mistake(load, tmp_path, name, make, spoil, expected):
    root = tmp_path / 'root'
    make(root)
    load(name)  # good as it was made
    prepared = set((tmp_path / 'cache').iterdir())
    spoil(root)
    assert expected in fails(load, name=name)
    assert set((tmp_path / 'cache').iterdir()) == prepared  # nothing half-written


@pytest.mark.parametrize('name', ['mvtec_ad', 'folder', 'ksdd2'])
def test_root_missing_or_empty(load, tmp_path, name):
    root = tmp_path / 'root'
    assert f'{root}: no such folder; check --config.data.root' in fails(load, name=name)
    root.mkdir()
    assert f'{root}: the folder is empty; check --config.data.root' in fails(load, name=name)
    assert not (tmp_path / 'cache').exists()


@pytest.mark.parametrize('category', ['bolt', '', '..', 'nut/train'])
def test_category_missing(load, tmp_path, category):
    make_category(tmp_path / 'root/nut')
    make_category(tmp_path / 'root/washer')
    message = fails(load, category=category)
    assert repr(category) in message
    assert '--config.data.category from: nut, washer' in message


def test_root_is_itself_a_category(load, tmp_path):
    make_category(tmp_path / 'root')
    assert '--config.data.name=folder' in fails(load)


def test_flags_that_cannot_be(load):
    assert '--config.data.root' in fails(load, name='folder', root='')
    assert '--config.data.name=imagenet' in fails(load, name='imagenet')
    message = fails(load, root='', category='cable')
    assert '--config.data.category=cable' in message
    assert 'screw, surface' in message
    assert '--config.data.root' in message
    assert '--config.data.seed' in fails(load, root='', category='screw', seed=-1)


# Real data


@pytest.fixture(scope='module')
def real():
    if 'SSN_JAX_DATA' not in os.environ:
        pytest.skip(
            'SSN_JAX_DATA does not name a folder with mvtec_ad, kolektorsdd_items, originals'
        )
    return Path(os.environ['SSN_JAX_DATA'])


@pytest.mark.parametrize(
    ('category', 'train', 'test'),
    [
        ('bottle', 209, {'good': 20, 'broken_large': 20, 'broken_small': 22, 'contamination': 21}),
        (
            'screw',
            320,
            {
                'good': 41,
                'manipulated_front': 24,
                'scratch_head': 24,
                'scratch_neck': 25,
                'thread_side': 23,
                'thread_top': 23,
            },
        ),
    ],
)
def test_real_mvtec_ad(load, real, category, train, test):
    dataset = load(root=real / 'mvtec_ad', category=category, size=(64, 64))
    assert Counter(dataset.train.defects) == {'good': train}
    assert Counter(dataset.test.defects) == test
    marked = dataset.test.masks.any((1, 2))
    assert (marked <= (dataset.test.labels == 1)).all()
    assert marked.sum() >= 0.95 * dataset.test.labels.sum()  # at 64x64 the finest may vanish
    if category == 'screw':  # grey files
        assert (dataset.test.images[..., 0] == dataset.test.images[..., 2]).all()


def test_real_kolektorsdd(load, real):
    dataset = load('ksdd2', root=real / 'kolektorsdd_items', size=(640, 232))
    assert dataset.train.images.shape == (191, 640, 232, 3)
    assert (dataset.train.labels.sum(), dataset.test.labels.sum()) == (25, 25)
    assert (dataset.test.masks.any((1, 2)) == (dataset.test.labels == 1)).all()


def test_real_originals(load, real, tmp_path):
    originals = real / 'originals'
    bottle = images.decode(images.read(originals / 'bottle/000.png'), 'bottle')
    screw = images.decode(images.read(originals / 'screw/000.png'), 'screw')
    assert (bottle.shape, screw.shape) == ((900, 900, 3), (1024, 1024, 3))
    assert images.decode_mask(images.read(originals / 'bottle/000_mask.png'), 'mask').any()

    # Images of unlike sizes and formats become one array.
    root = tmp_path / 'root'
    for name, place in (
        ('bottle/000.png', 'train/good/0.png'),
        ('screw/000.png', 'train/good/1.png'),
        ('kolektorsdd/000.jpg', 'train/good/2.jpg'),
        ('bottle/000.png', 'test/dent/0.png'),
        ('bottle/000_mask.png', 'ground_truth/dent/0_mask.png'),
    ):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes((originals / name).read_bytes())
    dataset = load('folder', size=(256, 256))
    assert dataset.train.images.shape == (3, 256, 256, 3)
    assert (dataset.train.images[0] == images.resize(bottle, (256, 256))).all()
    assert dataset.test.masks.any()


def test_an_image_is_cut_out_of_the_middle(load, tmp_path):
    """Resized to 12 x 10 and cut to 6 x 4: rows 3 to 8, columns 3 to 6, of the mask too."""
    make_category(tmp_path / 'root/nut')
    image = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)
    write(tmp_path / 'root/nut/test/dent/000.png', image)
    config = ml_collections.ConfigDict(
        {'name': 'mvtec_ad', 'root': str(tmp_path / 'root'), 'category': 'nut', 'seed': 0}
        | {'cache': str(tmp_path / 'cache')}
    )
    split = data.load(config, (6, 4), SIZE).test
    np.testing.assert_array_equal(split.images[0], image[3:9, 3:7, ::-1])
    np.testing.assert_array_equal(split.masks[0], half_mask(value=1)[3:9, 3:7])
