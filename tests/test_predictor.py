"""The Python API: a run as a function of frames."""

import concurrent.futures
import csv
import pathlib
import re
import subprocess
import sys
import time

import commands
import cv2
import numpy as np
import pytest
import tiny

import ssn_jax
from ssn_jax import config as config_lib, predict_folder, predictor
from ssn_jax.data import images

pytestmark = pytest.mark.usefixtures('small_programs')


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return ssn_jax.load(tiny.fake_run(tmp_path_factory.mktemp('api'), threshold=-0.3))


def frame(seed=0, height=96, width=80):
    """A noisy frame with a bright spot."""
    image = np.random.default_rng(seed).integers(0, 120, (height, width, 3), np.uint8)
    image[20:40, 10:50] = 250
    return image


def check(ours, theirs):
    assert ours.score == theirs.score and ours.probability == theirs.probability
    assert ours.defective == theirs.defective and ours.regions == theirs.regions
    assert np.array_equal(ours.map, theirs.map)


def test_frames_of_every_kind_mean_what_they_show(model):
    rgb = frame()
    expected = model(rgb)
    assert expected.map.shape == (64, 64) and expected.map.dtype == np.float32
    assert expected.probability == pytest.approx(1 / (1 + np.exp(-expected.score)))
    check(model(np.dstack([rgb, rgb[..., 0]])), expected)  # RGBA
    check(model(rgb.astype(np.uint16) * 257), expected)
    check(model(rgb / 255.0, white=1.0), expected)
    check(model(rgb.astype(np.uint16) * 16, white=4080), expected)
    check(model(np.asfortranarray(rgb)), expected)
    grey = model(cv2.cvtColor(rgb[..., :1], cv2.COLOR_GRAY2RGB))
    check(model(rgb[..., 0]), grey)
    check(model(rgb[..., :1]), grey)


def test_several_frames_of_any_size(model):
    """A list and a batch give what each frame gives, to the rounding of another program."""
    frames = [frame(i, 60 + 7 * i, 90 - i) for i in range(11)]
    found = model(frames)
    assert isinstance(found, list) and model([]) == []
    for one, image in zip(found, frames, strict=True):
        alone = model(image)
        assert one.score == pytest.approx(alone.score, abs=1e-4)
        assert one.full_map().shape == image.shape[:2]
    batch = np.stack([frame(i) for i in range(3)])
    for one, image in zip(model(batch), model(list(batch)), strict=True):
        check(one, image)


@pytest.mark.parametrize(
    'x, words',
    [
        (frame() / 255.0, r'shape \(96, 80, 3\) and type float64.*white=1\.0'),
        (frame().transpose(2, 0, 1), r'shape \(3, 96, 80\)'),
        (frame()[..., :2], r'\(96, 80, 2\).*RGBA'),
        (np.zeros((0, 5, 3), np.uint8), r'\(0, 5, 3\)'),
        (np.zeros(5, np.uint8), r'\(5,\)'),
        (frame() > 3, 'type bool'),
        (frame().astype(int), 'type int64'),
        ('a.png', r'shape \(\)'),
    ],
)
def test_what_is_no_frame_is_told_by_shape_and_type(x, words, model):
    with pytest.raises(ValueError, match=words):
        model(x)


def test_values_beyond_white_are_told(model):
    for bad in (frame() * 2.0, frame() - 1.0, np.full((5, 5), np.nan)):
        with pytest.raises(ValueError, match='not in 0'):
            model(bad, white=255)
    with pytest.raises(ValueError, match=r'\(1, 96, 80, 3\).*\(N, 64, 64, 3\)'):
        model.logits(frame()[None])


def test_regions_are_boxes_of_the_frame(monkeypatch):
    config = ssn_jax.default_config()
    config.update(image_size=(64, 64), resize=(128, 80))
    model = predictor.Predictor(config, None, 300, {'threshold': 0.0}, pathlib.Path('run'))
    logits = np.full((1, 64, 64), -5, np.float32)
    logits[0, 10:20, 8:16], logits[0, 40:44, 30:34] = 2, 4
    monkeypatch.setattr(model, 'logits', lambda images: (logits.max((1, 2)), logits))
    result = model(np.zeros((256, 160, 3), np.uint8))
    # The map covers rows 64 to 192 and columns 16 to 144 of the frame, at half its size.
    assert result.regions == [(76, 144, 8, 8, 64, 4.0), (32, 84, 16, 20, 320, 2.0)]
    full = result.full_map()
    assert full.shape == (256, 160) and np.isnan(full[:64]).all() and np.isnan(full[:, :16]).all()
    assert full[64:192, 16:144].max() == 4 and np.isfinite(full[64:192, 16:144]).all()
    model.threshold = 5.0
    assert model(np.zeros((256, 160, 3), np.uint8)).regions == []


def test_the_threshold_is_the_runs_or_ones_own(model):
    assert model.threshold == -0.3
    own = predictor.open_run(model.workdir, threshold=0.9)
    assert own.threshold == pytest.approx(np.log(9))
    for bad in (0.0, 1.0, 3.0, float('nan')):
        with pytest.raises(ssn_jax.UserError, match='no probability'):
            predictor.open_run(model.workdir, threshold=bad)
    own.threshold = None
    with pytest.raises(ssn_jax.UserError, match='threshold=PROBABILITY'):
        own(frame())


def test_the_command_gives_the_same_numbers(model, tmp_path):
    for i in range(3):
        (tmp_path / 'in').mkdir(exist_ok=True)
        assert cv2.imwrite(str(tmp_path / f'in/{i}.png'), frame(i)[..., ::-1])
    predict_folder.predict(model, tmp_path / 'in', tmp_path / 'out')
    with (tmp_path / 'out/predictions.csv').open(newline='') as f:
        rows = list(csv.DictReader(f))
    for row, result in zip(rows, model([frame(i) for i in range(3)]), strict=True):
        assert row['score'] == f'{result.score:.6g}'
        assert row['p_value'] == '' and result.p_value is None  # It is no finished run.
        assert float(row['threshold']) == pytest.approx(model.threshold, rel=1e-5)
        assert (row['run'], row['version']) == (model.workdir.name, ssn_jax.__version__)
        assert (row['decision'] == 'defective') == result.defective
        if result.defective:
            box = [int(row[name]) for name in ('x', 'y', 'width', 'height')]
            assert box == list(result.regions[0][:4])


@pytest.mark.slow
def test_the_examples_of_the_documents(tmp_path, monkeypatch):
    """Those of docs/inference.md: a run is trained and used, both from Python, in small."""
    page = (commands.ROOT / 'docs/inference.md').read_text()
    used, trained = re.findall(r'```python\n(import ssn_jax.*?|config = .*?)```', page, re.DOTALL)
    tiny.write_data(tmp_path / 'data')
    monkeypatch.chdir(tmp_path)
    small = tiny.config(tmp_path, sparse=False, **{'data.name': 'folder'})
    tiny.write_weights(tmp_path / 'resnet18.safetensors')
    monkeypatch.setattr(ssn_jax.config, 'default_config', small.copy_and_resolve_references)
    names = {'ssn_jax': ssn_jax, 'frame': frame()}
    trained = trained.replace("'ROOT'", f'{str(tmp_path / "data/nut")!r}').replace('20', '1')
    exec(trained, names)
    assert names['results']['epochs'] == 1
    exec(used.replace('runs/mine', 'runs/own'), names)
    assert names['result'].map.shape == (64, 64)


def test_what_is_piped_into_head_ends_quietly(tmp_path):
    command = f'{sys.executable} -m ssn_jax train --help | head -1'
    done = subprocess.run(
        ['bash', '-c', command], capture_output=True, text=True, cwd=commands.ROOT, check=False
    )
    assert done.stderr == '' and done.stdout.startswith('Trains a config')


def test_threads_may_share_a_model(model):
    frames = [frame(i) for i in range(16)]
    alone = [model(image) for image in frames]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for one, result in zip(alone, pool.map(model, frames), strict=True):
            check(one, result)


def test_importing_the_package_imports_nothing_that_trains():
    code = 'import sys, ssn_jax; print(*sorted(sys.modules))'
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=commands.ROOT, check=True
    )
    took = time.perf_counter() - began
    assert not {'jax', 'flax', 'optax', 'orbax', 'tensorflow_datasets', 'cv2'} & {
        *done.stdout.split()
    }
    assert took < 2  # The interpreter's own start included.
    code = 'import sys, ssn_jax; ssn_jax.load; print(*sorted(sys.modules))'
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=commands.ROOT, check=True
    )
    assert not {'optax', 'orbax', 'tensorflow_datasets', 'huggingface_hub', 'matplotlib'} & {
        *done.stdout.split()
    }


@pytest.mark.parametrize('seed', range(5))
def test_padded_images_keep_their_aspect_ratio_and_their_places(seed):
    """A square in an image of any shape: found at its place in the map, and its map at its own."""
    rng = np.random.default_rng(seed)
    config = config_lib.default_config()
    config.fit, config.image_size = 'pad', tuple(int(n) for n in rng.integers(64, 300, 2))
    size = tuple(int(n) for n in rng.integers(40, 900, 2))
    mask = np.zeros(size, np.uint8)
    top, left = (int(rng.integers(0, n - n // 3)) for n in size)
    mask[top : top + size[0] // 3, left : left + size[1] // 3] = 1
    fitted = images.fit_mask(mask, tuple(config.image_size), how='pad')
    image = images.fit(mask[..., None].repeat(3, -1) * np.uint8(255), fitted.shape, how='pad')
    view = predictor.View(config, size)
    assert fitted.shape == image.shape[:2] == tuple(config.image_size)
    # All of the margin is grey, and nothing else; the sides keep their ratio to a pixel.
    margin = np.ones(fitted.shape, bool)
    margin[view.inside] = False
    assert (image[margin] == image[margin][:1]).all() and not fitted[margin].any()
    inside = fitted[view.inside].shape
    assert inside[0] == fitted.shape[0] or inside[1] == fitted.shape[1]
    scale = max(n / m for n, m in zip(inside, size, strict=True))
    assert all(abs(n - scale * m) <= 1 for n, m in zip(inside, size, strict=True))
    logits = np.where(fitted, 9.0, -9.0).astype(np.float32)[view.inside]
    found = predictor.Result(9.0, 1.0, None, True, logits, view)
    x, y, width, height = found.regions[0][:4]
    slack = np.ceil(1 / scale) + 1
    expected = left, top, size[1] // 3, size[0] // 3
    assert np.allclose(
        (x, y, x + width, y + height),
        (*expected[:2], left + expected[2], top + expected[3]),
        atol=slack,
    )
    assert found.full_map().shape == size
