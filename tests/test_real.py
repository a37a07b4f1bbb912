"""A small part of the real data through the whole main job; skipped without it."""

import json
import math
import os
import pathlib
import shutil

import pytest

from ssn_jax import config as config_lib, metrics, pipeline

pytestmark = pytest.mark.usefixtures('small_programs')

COUNT = 8


def folder(variable: str) -> pathlib.Path:
    """The folder that an environment variable names; skips the test without it."""
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f'{variable} is not set: this test needs real data')
    return pathlib.Path(value)


def copy_subset(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies 8 training images, 4 normal and 4 defective test images with their masks."""
    defects = sorted(p.name for p in (source / 'test').iterdir() if p.name != 'good')
    wanted = [('train/good', COUNT), ('test/good', COUNT // 2)]
    wanted += [(f'test/{defects[i % len(defects)]}', 1 + i // len(defects)) for i in range(4)]
    for part, count in wanted:
        for image in sorted((source / part).glob('*.png'))[:count]:
            (target / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(image, target / part)
            mask = source / 'ground_truth' / image.parent.name / f'{image.stem}_mask.png'
            if mask.exists():
                (target / 'ground_truth' / image.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(mask, target / 'ground_truth' / image.parent.name)


@pytest.mark.slow
def test_mod2_on_a_real_subset(tmp_path):
    """One epoch of 8 images: all seven metrics are finite, and everything is in the workdir."""
    category = 'screw'
    data, weights = folder('SSN_JAX_DATA'), folder('SSN_JAX_WEIGHTS')
    copy_subset(data / 'mvtec_ad' / category, tmp_path / 'data' / category)
    config = config_lib.load('mod2')
    config.epochs, config.batch_size, config.image_size = 1, COUNT, (64, 64)
    config.decision.parts = 0
    config.data.root, config.data.cache = str(tmp_path / 'data'), str(tmp_path / 'cache')
    config.data.category = category
    config.backbone.weights = str(weights / 'resnet18.tv_in1k.layer1-3.safetensors')

    workdir = tmp_path / 'run'
    results = pipeline.train_and_evaluate(config, workdir)
    assert results == json.loads((workdir / 'results.json').read_text())
    assert list(results['metrics']) == list(metrics.METRICS) and len(metrics.METRICS) == 7
    for name, value in results['metrics'].items():
        assert value is not None and math.isfinite(value) and 0 <= value <= 1, name
    assert results['undefined'] == {}
    assert not results['embedded'] and results['category'] == category
    assert (results['train_images'], results['test_images']) == (COUNT, COUNT)
    assert (workdir / 'figures' / 'overlays.png').stat().st_size > 0
    assert (workdir / 'train.csv').read_text().count('\n') == 2
