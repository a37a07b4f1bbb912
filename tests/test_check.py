"""`ssn-jax check`: what training would read, and what is doubtful about it."""

import json
import os
from pathlib import Path
import shlex
import shutil

import cv2
import numpy as np
import pytest
from test_layouts import RNG, load, mark, root, write  # noqa: F401

from ssn_jax import cli
from ssn_jax.data import records
from ssn_jax.errors import UserError

DATA = os.environ.get('SSN_JAX_DATA')


def check(capsys, *arguments):
    """Exit status, and what is printed on stdout and stderr."""
    status = cli.check([str(word) for word in arguments])
    return status, *capsys.readouterr()


def as_json(capsys, *arguments):
    """Exit status, the images by file, and the doubts as pairs."""
    status, out, _ = check(capsys, *arguments, '--json')
    found = json.loads(out)
    assert found.keys() == {'images', 'doubts'}
    return (
        status,
        {image.pop('file'): image for image in found['images']},
        [(doubt['file'], doubt['reason']) for doubt in found['doubts']],
    )


def test_a_clean_folder(root, capsys, tmp_path):  # noqa: F811
    before = sorted(root.rglob('*'))
    (root / 'ground_truth/scratch/6_mask.png').unlink()
    write(root / 'test/good/3.png', RNG.integers(0, 2**16, (20, 30), np.uint16))

    status, found, doubts = as_json(capsys, root, '--masks', tmp_path / 'masks')
    assert (status, doubts) == (0, [])
    normal = {'split': 'train', 'label': 0, 'defect': 'good', 'size': [12, 10], 'bits': 8}
    assert found['train/good/0.png'] == normal | {'mask_pixels': 0}
    deep = normal | {'split': 'test', 'size': [20, 30], 'bits': 16, 'mask_pixels': 0}
    assert found['test/good/3.png'] == deep
    scratch = normal | {'split': 'test', 'label': 1, 'defect': 'scratch'}
    assert found['test/scratch/5.png'] == scratch | {'mask_pixels': 12}
    assert found['test/scratch/6.png'] == scratch | {'mask_pixels': None}
    assert len(found) == 7
    [written] = [path for path in (tmp_path / 'masks').rglob('*') if path.is_file()]
    assert written == tmp_path / 'masks/test/scratch/5.png.png'
    expected = (root / 'ground_truth/scratch/5_mask.png').read_bytes()
    masks = [cv2.imdecode(np.frombuffer(x, np.uint8), -1) for x in (written.read_bytes(), expected)]
    assert (masks[0] == masks[1]).all()

    status, out, err = check(capsys, root)
    assert (status, err) == (0, '') and 'Nothing is doubtful.' in out
    rows = [line.split() for line in out.splitlines()[:4]]
    assert rows[1] == ['train', 'good', '3', '12x10', '8']
    assert rows[2] == ['test', 'good', '2', *'20x30 (1), 12x10 (1) 16 (1), 8 (1)'.split()]
    assert rows[3] == ['test', 'scratch', '2', '1', '12x10', '8']
    assert out.splitlines()[-1] == (
        f'  ssn-jax train --config auto --config.data.name=folder --config.data.root={root} '
        '--workdir runs/root'
    )
    assert sorted(root.rglob('*')) == [path for path in before if '6_mask' not in path.name]


def test_every_doubt_names_its_file(root, capsys, tmp_path):  # noqa: F811
    (root / 'train/good/notes.txt').write_text('')
    (root / 'train/good/more.txt').write_text('')
    shutil.copy(root / 'train/good/1.png', root / 'test/scratch/x.png')
    mark(root / 'ground_truth/scratch/9_mask.png')
    sheet = tmp_path / 'sheet.png'
    status, out, err = check(capsys, root, '--sheet', sheet)
    assert (status, err) == (0, '')
    files = 'train/good/notes.txt', 'train/good/more.txt', 'test/scratch/x.png'
    for file in (*files, 'ground_truth/scratch/9_mask.png'):
        assert len([line for line in out.splitlines() if line.startswith(f'{file}: ')]) == 1, file
    assert cv2.imread(str(sheet)).shape[1] > 500


def test_training_tells_the_same(root, capsys, tmp_path, caplog):  # noqa: F811
    (root / 'train/good/notes.txt').write_text('')
    shutil.copy(root / 'train/good/1.png', root / 'test/good/x.png')
    shape = (12, 10)
    write(root / 'ground_truth/scratch/5_mask.png', np.zeros(shape, np.uint8))
    write(
        root / 'ground_truth/scratch/6_mask.png', 255 * (np.indices(shape)[0] > 3).astype(np.uint8)
    )
    write(root / 'train/good/0.png', RNG.integers(2**11, 2**12, shape, np.uint16))
    write(root / 'test/good/3.png', RNG.integers(0, 2**16, shape, np.uint16))
    _, found, doubts = as_json(capsys, root)
    assert {file for file, _ in doubts} == {
        *('train/good/notes.txt', 'test/good/x.png', 'test/good/3.png'),
        *('test/scratch/5.png', 'test/scratch/6.png'),
    }
    wide = as_json(capsys, root, '--config.image_size=(32,48)', '--config.data.range=4095')
    assert dict(wide[2]).keys() == dict(doubts).keys()
    assert [found[f'test/scratch/{i}.png']['mask_pixels'] for i in (5, 6)] == [0, 80]
    caplog.clear()
    load(root, tmp_path)
    told = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
    assert len(told) == len(doubts)
    for file, reason in doubts:
        assert any(file in line and line.endswith(reason) for line in told), reason


def test_what_cannot_be_read(root, capsys, tmp_path):  # noqa: F811
    (root / 'test/good/3.png').write_bytes(b'no image')
    write(root / 'ground_truth/scratch/6_mask.png', np.eye(6, 10, dtype=np.uint8))
    status, found, doubts = as_json(capsys, root, '--sheet', tmp_path / 'sheet.png')
    assert status == 1 and dict(doubts).keys() == {'test/good/3.png', 'test/scratch/6.png'}
    assert 'does not decode' in dict(doubts)['test/good/3.png']
    assert '6_mask.png: the mask is 6x10' in dict(doubts)['test/scratch/6.png']
    unread = {'split': 'test', 'label': 0, 'defect': 'good', 'size': None, 'bits': None}
    assert found['test/good/3.png'] == unread | {'mask_pixels': None}
    assert len(found) == 7
    status, out, err = check(capsys, root)
    assert status == 1 and [line[:7] for line in err.splitlines()] == ['error: '] * 2
    assert 'Once the errors are mended, train with' in out and 'does not decode' not in out


def test_layouts_are_told_by_looking(root, capsys, tmp_path):  # noqa: F811
    (root.parent / '.hidden').mkdir()
    _, out, _ = check(capsys, root.parent)
    assert '--config.data.name=mvtec_ad' in out and '--config.data.category=root' in out
    assert 'root/train/good/0.png' in as_json(capsys, root.parent)[1]
    shutil.copytree(root, root.parent / 'other')
    with pytest.raises(UserError, match=r'choose --config\.data\.category from: other, root'):
        check(capsys, root.parent)
    assert len(as_json(capsys, root.parent, '--category', 'other')[1]) == 7

    for split in ('train', 'test'):
        for i in range(2):
            write(tmp_path / f'ksdd2/{split}/{i}.png')
        write(tmp_path / f'ksdd2/{split}/0_GT.png', np.zeros((12, 10), np.uint8))
        mark(tmp_path / f'ksdd2/{split}/1_GT.png')
    status, found, doubts = as_json(capsys, tmp_path / 'ksdd2')
    assert (status, doubts) == (0, [])
    assert [image['label'] for image in found.values()] == [0, 1, 0, 1]
    assert '--config.data.name=ksdd2' in check(capsys, tmp_path / 'ksdd2')[1]

    with pytest.raises(UserError, match='train/good: does not exist'):
        check(capsys, tmp_path / 'ksdd2', '--config.data.name=folder')
    flags = '--normal_dir=train/good', '--config.data.defect_dir=test/scratch'
    status, out, _ = check(capsys, root, *flags)
    assert status == 0 and out.splitlines()[-1].endswith(
        f'--config.data.name=folder --config.data.root={root} --config.data.normal_dir=train/good '
        '--config.data.defect_dir=test/scratch --workdir runs/root'
    )
    # What it was read with, it is trained with.
    flags = (
        *('--config.data.range=4095.0', '--config.data.masks=nearest'),
        '--config.image_size=(32,32)',
    )
    _, out, _ = check(capsys, root, *flags)
    assert set(flags) <= set(shlex.split(out.splitlines()[-1]))


def test_without_test_images(root, capsys):  # noqa: F811
    shutil.rmtree(root / 'test')
    shutil.rmtree(root / 'ground_truth')
    status, out, _ = check(capsys, root)
    assert status == 0 and 'There are no test images' in out


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['.', '--config.epochs=3'], 'epochs belongs to training: this command takes'),
        (['.', '--config.image_size=(8,8)'], 'it is .height, width., each at least 32'),
        (['.', '--config.image_size=a'], 'config.image_size'),
        (['.', '--name=synthetic'], 'has no folder to check'),
    ],
)
def test_mistakes(arguments, expected, capsys, tmp_path, monkeypatch):
    """tests/test_bad_input.py has more of them."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=expected):
        check(capsys, *arguments)


@pytest.mark.parametrize(
    ('name', 'images'),
    [
        *(('mvtec_ad/bottle', 292), ('mvtec_ad/screw', 480), ('mvtec_ad/transistor', 313)),
        *(('aitex/02', 322), ('aitex/04', 331), ('kolektorsdd_items', 383)),
    ],
)
def test_nothing_is_doubtful_about_real_data(name, images, capsys):
    if not DATA:
        pytest.skip('SSN_JAX_DATA does not name a folder with mvtec_ad, aitex, kolektorsdd_items')
    status, found, doubts = as_json(capsys, Path(DATA, name))
    assert (status, len(found), doubts) == (0, images, [])
    assert all((image['mask_pixels'] > 0) == bool(image['label']) for image in found.values())


@pytest.mark.parametrize(
    'seen, expected',
    [
        ([], None),
        ([(256, 256, 0)] * 3, None),
        ([(1000, 1000, 0)] * 3, None),  # Nothing is known of its defects.
        ([(1000, 1000, 4000)] * 3, None),  # 63 pixels a side, 16 at 256x256.
        ([(1000, 1000, 900)] * 3 + [(1000, 1000, 0)] * 9, (400, 400)),  # 30 a side, 12 at 400.
        ([(300, 300, 9)] * 3, (304, 304)),  # No larger than the file.
        ([(4000, 4000, 100)] * 3, (1024, 1024)),
        ([(200, 5000, 0)] * 3, (48, 1280)),  # As many pixels, in its shape: 51x1280.
        ([(640, 256, 0)] * 3, (408, 160)),
    ],
)
def test_the_image_size_that_is_recommended(seen, expected):
    assert records.recommended_size(seen, (256, 256)) == expected


@pytest.mark.parametrize(
    'seen, expected',
    [
        ([(1000, 1000, 900)] * 3, (400, 400)),  # Nothing is padded.
        ([(400, 600, 0)] * 3, None),
        ([(400, 700, 0)] * 3, None),  # It takes more than half of 256x256.
        ([(200, 5000, 0)] * 3, (48, 1280)),
        ([(200, 800, 4000)] * 3, None),  # 20 pixels a side, and nothing is squashed.
        ([(200, 800, 900)] * 3, (128, 512)),  # 10 a side at 64x256, 19 at 128x512.
        ([(200, 5000, 2000)] * 3, (56, 1344)),  # 5 a side at 10x256, 12 at 54x1342.
    ],
)
def test_the_image_size_that_is_recommended_for_padded_images(seen, expected):
    assert records.recommended_size(seen, (256, 256), 'pad') == expected
