"""Names and places: which files are read as what, and what is said of those that are not."""

import os
from pathlib import Path
import shutil

import cv2
import ml_collections
import numpy as np
import pytest

from ssn_jax import data, predict_folder
from ssn_jax.data import layouts, records
from ssn_jax.data.doubts import REASONS
from ssn_jax.errors import UserError

CASES = os.environ.get('SSN_JAX_CASES')


RNG = np.random.default_rng(0)


def write(file: Path, image=None):
    """An image, if none is given of noise that is in no other one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = RNG.integers(0, 255, (12, 10), np.uint8) if image is None else image
    assert cv2.imwrite(str(file), image)


def mark(file: Path):
    """A mask of 12 pixels."""
    mask = np.zeros((12, 10), np.uint8)
    mask[2:5, 3:7] = 255
    write(file, mask)


@pytest.fixture
def root(tmp_path):
    """Three images to learn from, two normal ones and two scratches to test on, with masks."""
    base = tmp_path / 'root'
    for name in ('train/good/0', 'train/good/1', 'train/good/2', 'test/good/3', 'test/good/4'):
        write(base / f'{name}.png')
    for i in (5, 6):
        write(base / f'test/scratch/{i}.png')
        mark(base / f'ground_truth/scratch/{i}_mask.png')
    return base


def find(root='', name='folder', need='train', **fields):
    config = {'name': name, 'root': str(root), 'category': '', 'cache': '', 'seed': 0}
    return records.find(ml_collections.ConfigDict(config | fields), need)


def seen(root='', **fields):
    """By file the split, class and mask (its last two parts) of what is found."""
    return {
        r.file: (r.split, r.defect, r.mask and '/'.join(r.mask.parts[-2:]))
        for r in find(root, **fields).records
    }


def doubted(root='', **fields):
    """By file the kind of doubt."""
    return {doubt.file: doubt.kind for doubt in find(root, **fields).doubts}


def test_a_clean_folder_raises_no_doubt(root):
    assert not doubted(root)
    assert seen(root)['test/scratch/5.png'] == ('test', 'scratch', 'scratch/5_mask.png')
    assert sum(defect == 'good' for _, defect, _ in seen(root).values()) == 5


@pytest.mark.parametrize('name', ['ok', 'OK', 'Normal', ' good ', 'GOOD'])
def test_names_of_the_normal_class(root, name):
    for split in layouts.SPLITS:
        (root / split / 'good').rename(root / split / name)
    write(root / 'train/good/7.png')
    mark(root / f'ground_truth/{name}/3_mask.png')  # Of a normal image, whose mask is known.
    found = seen(root)
    assert found[f'train/{name}/0.png'] == ('train', 'good', None)
    assert found[f'test/{name}/3.png'] == ('test', 'good', None)
    assert {defect for _, defect, _ in found.values()} == {'good', 'scratch'}
    assert not doubted(root)


def test_other_names_of_the_normal_class(root):
    (root / 'train/good').rename(root / 'train/Gut')
    with pytest.raises(UserError, match=r'train/good: does not exist.*Gut/.*data\.normal=NAME'):
        find(root)
    found = seen(root, normal='pass, gut')
    assert found['train/Gut/0.png'][1] == found['test/good/3.png'][1] == 'good'
    (root / 'train/ok').mkdir()
    write(root / 'train/ok/0.png')
    assert seen(root, normal='gut')['train/ok/0.png'][1] == 'ok'


def test_subfolders_and_links(root, tmp_path):
    for folder in ('train/good', 'test/good', 'test/scratch'):
        write(root / folder / 'line 2/deep/0.png')
    mark(root / 'ground_truth/scratch/line 2/deep/0_mask.png')
    write(tmp_path / 'elsewhere/9.png')
    (root / 'train/good/link').symlink_to(tmp_path / 'elsewhere')
    (root / 'train/dent').symlink_to(tmp_path / 'elsewhere')
    for loop in ('train/loop', 'train/good/loop', 'test/good/line 2/deep/loop'):
        (root / loop).symlink_to(root)
    (root / 'train/good/a').symlink_to(root / 'train/good/b')
    (root / 'train/good/b').symlink_to(root / 'train/good')
    found = seen(root)
    assert len(found) == 7 + 3 + 2
    assert found['train/good/link/9.png'] == ('train', 'good', None)
    assert found['train/dent/9.png'] == ('train', 'dent', None)
    mask = root / 'ground_truth/scratch/line 2/deep/0_mask.png'
    assert found['test/scratch/line 2/deep/0.png'] == ('test', 'scratch', 'deep/0_mask.png')
    assert mask in [r.mask for r in find(root).records]
    good = {name.removeprefix('train/good/') for name in found if name.startswith('train/good')}
    shown = predict_folder.find(root / 'train/good')
    assert good == {path.relative_to(root / 'train/good').as_posix() for path in shown}


def test_endings_are_the_same_everywhere(root, caplog):
    good = root / 'train/good'
    encoded = (good / '0.png').read_bytes()
    for name in ('a.jfif', 'b', 'c.TIFF', 'd.gif'):
        (good / name).write_bytes(encoded)
    for name, content in (('e.heic', encoded), ('f', b'text'), ('g.txt', b''), ('h.png.bak', b'')):
        (good / name).write_bytes(content)
    os.mkfifo(good / 'pipe')
    (good / '.hidden.txt').write_text('')
    (root / 'ground_truth/scratch/notes.txt').write_text('')
    found, doubts = seen(root), doubted(root)
    read = {'a.jfif', 'b', 'c.TIFF', 'd.gif', '0.png', '1.png', '2.png'}
    left = {'e.heic', 'f', 'g.txt', 'h.png.bak', 'pipe'}
    assert {f'train/good/{name}' for name in read} == {x for x in found if x.startswith('train')}
    others = {f'train/good/{name}' for name in left} | {'ground_truth/scratch/notes.txt'}
    assert doubts == dict.fromkeys(others, 'no image')
    assert {path.name for path in predict_folder.find(good, warn=True)} == read
    [told] = [r.getMessage() for r in caplog.records]
    assert told == f'5 (e.heic, f, g.txt, ...): {REASONS["no image"]}'


@pytest.mark.parametrize('name', ['masks', 'mask', 'labels', 'Ground_Truth', 'Ground Truth'])
def test_names_of_the_folder_of_masks(root, name):
    (root / 'ground_truth').rename(root / name)
    assert seen(root)['test/scratch/5.png'][2] == 'scratch/5_mask.png' and not doubted(root)
    (root / 'ground_truth').mkdir()  # One without images is none of masks.
    (root / 'ground_truth/5.json').write_text('{}')
    assert seen(root)['test/scratch/5.png'][2] == 'scratch/5_mask.png'
    mark(root / 'ground_truth/scratch/5_mask.png')
    with pytest.raises(UserError, match='both hold masks') as caught:
        find(root)
    assert str(root / name) in str(caught.value) and 'ground_truth' in str(caught.value)
    assert seen(root, mask_dir=name)['test/scratch/6.png'][2] == 'scratch/6_mask.png'


def test_masks_called_as_their_images(root):
    masks = root / 'ground_truth/scratch'
    (masks / '5_mask.png').rename(masks / '5.bmp')
    assert seen(root)['test/scratch/5.png'][2] == 'scratch/5.bmp' and not doubted(root)
    mark(masks / '5_mask.png')
    assert seen(root)['test/scratch/5.png'][2] == 'scratch/5_mask.png'
    assert doubted(root) == {'ground_truth/scratch/5.bmp': 'mask of no image'}


def test_names_are_compared_in_one_form(root):
    composed, decomposed = 'Pr\u00fcfling', 'Pru\u0308fling'
    (root / 'test/scratch').rename(root / f'test/{decomposed}')
    (root / 'ground_truth/scratch').rename(root / f'ground_truth/{composed}')
    write(root / f'test/{decomposed}/{composed}.png')
    mark(root / f'ground_truth/{composed}/{decomposed}_mask.png')
    found = seen(root)[f'test/{decomposed}/{composed}.png']
    assert found == ('test', composed, f'{composed}/{decomposed}_mask.png') and not doubted(root)


def test_names_that_are_no_utf_8(root, tmp_path):
    for folder in (b'train/good', b'test/scratch'):
        os.rename(
            root / os.fsdecode(folder) / ('0.png' if b'good' in folder else '5.png'),
            os.fsencode(root) + b'/' + folder + b'/Pr\xfcf.png',
        )
    masks = os.fsencode(root / 'ground_truth/scratch')
    os.rename(masks + b'/5_mask.png', masks + b'/Pr\xfcf_mask.png')
    assert load(root, tmp_path).train.files[-1] == 'train/good/Pr\\xfcf.png'
    assert seen(root)['test/scratch/Pr\\xfcf.png'][2] is not None


def test_what_is_not_used_is_named(root):
    write(root / 'validation/good/0.png')
    write(root / 'notes/0.png')
    write(root / 'overview.png')
    (root / 'license.txt').write_text('')
    (root / 'empty').mkdir()
    write(root / 'train/stray.png')
    write(root / 'test/scratch/5_mask.png')
    mark(root / 'ground_truth/dent/0_mask.png')
    doubts = doubted(root)
    assert doubts == {
        'validation/': 'other folder',
        'notes/': 'other folder',
        'overview.png': 'stray image',
        'train/stray.png': 'stray image',
        'test/scratch/5_mask.png': 'mask among images',
        'ground_truth/dent/0_mask.png': 'mask of no image',
    }
    assert not doubts.keys() & seen(root).keys()


@pytest.mark.parametrize(
    'name',
    [
        *('test/scratch/5_GT', 'test/scratch/5-mask', 'test/scratch/mask_5', 'test/scratch/5.seg'),
        *('test/scratch/masks/5', 'test/scratch/labels/5', 'test/scratch/Ground Truth/5_mask'),
        *('test/ground_truth/scratch/5_mask', 'test/masks/5', 'train/mask/0', 'train/good/gt/0'),
    ],
)
def test_masks_among_images_are_none(root, name):
    mark(root / f'{name}.png')
    assert doubted(root) == {f'{name}.png': 'mask among images'}
    assert f'{name}.png' not in seen(root) and len(seen(root)) == 7


def test_masks_beside_a_folder_of_images(root):
    write(root / 'test/dent/images/0.png')
    mark(root / 'test/dent/masks/0.png')
    assert doubted(root) == {'test/dent/masks/0.png': 'mask among images'}
    assert seen(root)['test/dent/images/0.png'] == ('test', 'dent', None)


@pytest.mark.parametrize(
    'name', ['test/label/5', 'test/masks/9', 'test/scratch/a_mask', 'test/scratch/5gt']
)
def test_images_that_are_called_as_masks_of_none(root, name):
    write(root / f'{name}.png')
    assert not doubted(root) and f'{name}.png' in seen(root)


def test_case_of_train_and_test(root):
    (root / 'train').rename(root / 'Train')
    assert 'Train/good/0.png' in seen(root) and not doubted(root)
    shutil.copytree(root / 'Train', root / 'TRAIN')
    with pytest.raises(UserError, match=r'TRAIN and .*Train are both train'):
        find(root)


def test_folders_named_one_by_one(root, tmp_path):
    places = {'normal_dir': 'train/good', 'defect_dir': 'test', 'mask_dir': 'ground_truth'}
    assert seen(root, name='mvtec_ad', **places) == seen(root)
    flat = {'normal_dir': str(root / 'train/good'), 'defect_dir': str(root / 'test/scratch')}
    flat |= {'mask_dir': str(root / 'ground_truth/scratch')}
    found = seen(**flat)
    assert found['scratch/5.png'] == ('test', 'defect', 'scratch/5_mask.png') and len(found) == 5
    found = seen(root, **flat, normal_test_dir='test/good')
    assert found['test/good/3.png'] == ('test', 'good', None) and len(found) == 7
    assert found['test/scratch/5.png'][1] == 'defect'
    # One folder in another: what has a flag of its own is that.
    for path in (root / 'train/good').iterdir():
        path.rename(root / path.name)
    found = seen(root, normal_dir='.', defect_dir='test/scratch', normal_test_dir='test/good')
    assert len(found) == 7 + 2  # The masks have no flag here, and are taken for normal images.
    found = seen(root, normal_dir='nowhere', defect_dir='test/scratch', need='test')
    assert [*found] == ['test/scratch/5.png', 'test/scratch/6.png']
    # A run that was trained from a folder of its own is measured on a root that has test images.
    found = seen(root, normal_dir='nowhere', need='test')
    assert len(found) == 4 and {split for split, _, _ in found.values()} == {'test'}
    with pytest.raises(UserError, match=r'test images with --config\.data\.defect_dir'):
        find(normal_dir='nowhere', need='test')


@pytest.mark.parametrize(
    ('fields', 'expected'),
    [
        ({'normal_dir': 'nowhere'}, 'nowhere: no such folder; check --config.data.normal_dir'),
        ({'normal_dir': 'empty'}, 'empty: holds no images; check --config.data.normal_dir'),
        ({'defect_dir': 'test'}, '--config.data.normal_dir is missing beside --config.data.def'),
        ({'mask_dir': 'nowhere'}, 'nowhere: no such folder; check --config.data.mask_dir'),
        ({'normal_dir': 'train/good', 'mask_dir': 'no'}, 'no: no such folder; check --config.data'),
    ],
)
def test_a_folder_that_is_named_and_not_there(root, fields, expected):
    (root / 'empty').mkdir()
    with pytest.raises(UserError, match=expected):
        find(root, **fields)


def test_images_that_lie_flat(root):
    for path in (root / 'train/good').iterdir():
        path.rename(root / 'train' / path.name)
    with pytest.raises(
        UserError, match=r'train holds good/, 3 images\. .*--config\.data\.normal_d'
    ):
        find(root)
    assert len(seen(root, normal_dir='train')) == 3


def load(root, tmp_path, need='train', size=(12, 10), **fields):
    config = {'name': 'folder', 'root': str(root), 'category': '', 'seed': 0}
    config |= {'cache': str(tmp_path / 'cache')} | fields
    return data.load(ml_collections.ConfigDict(config), size, need=need)


@pytest.mark.parametrize('empty', [True, False])
def test_a_split_may_be_missing(root, tmp_path, empty):
    def remove(split):
        shutil.rmtree(root / split)
        if empty:
            (root / split / 'good').mkdir(parents=True)

    shutil.copytree(root, tmp_path / 'other')
    remove('test')
    dataset = load(root, tmp_path)
    assert len(dataset.train.files) == 3 and dataset.test.files == ()
    assert dataset.test.images.shape == (0, 12, 10, 3) and dataset.test.masks.shape == (0, 12, 10)
    with pytest.raises(UserError, match='test: holds no images'):
        load(root, tmp_path, need='test')
    root = tmp_path / 'other'
    (root / 'train').rename(tmp_path / 'train')
    if empty:
        (root / 'train/good').mkdir(parents=True)
    dataset = load(root, tmp_path, need='test')
    assert dataset.train.files == () and len(dataset.test.files) == 4
    with pytest.raises(UserError, match='train/good: '):
        load(root, tmp_path)


def test_the_same_file_in_training_and_test(root, tmp_path, caplog):
    shutil.copy(root / 'train/good/1.png', root / 'test/good/x.png')
    shutil.copy(root / 'train/good/2.png', root / 'test/scratch/y.png')
    load(root, tmp_path)
    [told] = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    pair = 'test/good/x.png and train/good/1.png'
    assert told == f'2 (test/good/x.png, test/scratch/y.png): {REASONS["in both splits"]}{pair}'


def test_another_name_of_the_class_prepares_the_set_anew(root, tmp_path):
    (root / 'train/scratch').mkdir()
    write(root / 'train/scratch/0.png')
    assert load(root, tmp_path).train.labels.tolist() == [0, 0, 0, 1]
    assert load(root, tmp_path, normal='scratch').train.labels.tolist() == [0, 0, 0, 0]


# Inputs that people have sent


def case(name):
    if not CASES:
        pytest.skip('SSN_JAX_CASES does not name a folder of inputs that people really have')
    return Path(CASES) / name


def test_cases():
    ok = seen(case('layouts/testname_ok2'))
    assert ok['test/ok/000.png'] == ('test', 'good', None)
    nested = seen(case('layouts/nested_mixed'))
    assert sum(split == 'train' for split, _, _ in nested.values()) == 7
    masks = seen(case('layouts/maskdir'))
    assert masks['test/blot/001.png'] == ('test', 'blot', 'blot/001_mask.png')
    assert [*predict_folder.find(case('endings'))] == [
        case('endings') / x for x in ('a.png', 'b.jfif', 'c')
    ]
    [mask] = [mask for _, defect, mask in seen(case('unicode')).values() if defect == 'scratch']
    assert mask.endswith('fling_mask.png')
    for name in ('layouts/testname_ok2', 'layouts/nested_mixed', 'layouts/maskdir', 'unicode'):
        assert not doubted(case(name)), name
