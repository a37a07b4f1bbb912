"""Prediction over several devices: the same numbers as on one, and padding that never counts."""

import pathlib
import sys

import commands
import jax
import numpy as np
import pytest
import rule

from ssn_jax import config as config_lib, evaluate, metrics, predictor
from ssn_jax.data import Split
from ssn_jax.fused import fold
from ssn_jax.models import grid as grid_lib, resnet
from ssn_jax.models.systems import SuperSimpleNet

# N of the test splits: fewer than devices, a multiple, no multiple, several calls with a rest.
SIZES = (1, 3, 4, 8, 19)


def split(n):
    """A split of n noisy images of which the second half has a bright square."""
    rng = np.random.default_rng(n)
    images = rng.integers(0, 200, (n, 32, 48, 3), dtype=np.uint8)
    masks = np.zeros((n, 32, 48), np.uint8)
    labels = (np.arange(n) >= n / 2).astype(np.int32)
    masks[labels == 1, 8:20, 8:24] = 1
    images[masks == 1] = 255
    names = tuple(map(str, range(n)))
    return Split(images, masks, np.ones(n, bool), labels, names, names)


def predictions():
    """Devices, and maps and scores of every split, two images a device and call."""
    network, config = SuperSimpleNet(), config_lib.default_config()
    config.update(image_size=(32, 48), eval_batch_size=2, engine='xla')
    fused = fold.fuse(rule.backbone('resnet18'), rule.network(network, 384), network)
    model = predictor.Predictor(config, fused)
    arrays = {'devices': jax.local_device_count()}
    for n in SIZES:
        scores, maps = evaluate.predict(model, split(n).images)
        arrays |= {f'scores{n}': scores, f'maps{n}': maps}
    return arrays


@pytest.fixture(scope='module')
def predicted(tmp_path_factory):
    """Predictions made by processes with 1 and with 4 host devices."""
    folder, running = tmp_path_factory.mktemp('devices'), {}
    for devices in (1, 4):
        running[devices] = commands.start(
            *(pathlib.Path(__file__).with_suffix(''), folder / f'{devices}.npz'),
            cwd=folder,
            XLA_FLAGS=f'--xla_force_host_platform_device_count={devices}',
        )
    assert [command.end() for command in running.values()] == [0, 0]
    arrays = {devices: dict(np.load(folder / f'{devices}.npz')) for devices in running}
    assert {devices: int(a['devices']) for devices, a in arrays.items()} == {1: 1, 4: 4}
    return arrays


@pytest.mark.parametrize('n', SIZES)
def test_four_devices_predict_what_one_does(predicted, n):
    for name in (f'maps{n}', f'scores{n}'):
        one, four = predicted[1][name], predicted[4][name]
        assert one.dtype == four.dtype == np.float32
        rule.check_close(four, one, rule.TERMS['resnet18'], rule.SCORES, name)
    assert predicted[4][f'maps{n}'].shape == (n, 32, 48)
    assert predicted[4][f'scores{n}'].shape == (n,)


@pytest.mark.parametrize('n', SIZES[1:])
def test_four_devices_measure_what_one_does(predicted, n):
    """All seven metrics."""
    one, four = (
        evaluate.evaluate(predicted[d][f'scores{n}'], predicted[d][f'maps{n}'], split(n))
        for d in (1, 4)
    )
    assert one[1] == four[1] == {}
    assert list(one[0]) == list(metrics.METRICS)
    assert four[0] == pytest.approx(one[0], abs=1e-3)
    assert all(0 <= value <= 1 for value in one[0].values())


def test_predictions_are_the_models(predicted):
    """Without pmap, batches or padding: images straight through backbone, heads and blur."""
    n, network = SIZES[-1], SuperSimpleNet()
    images = resnet.normalise(split(n).images)
    layers = resnet.BACKBONES['resnet18'].apply(rule.backbone('resnet18'), images)[1:]
    logits, scores = network.apply(rule.network(network, 384), grid_lib.upscale_pool(layers))
    maps = grid_lib.full_size_map(logits, (32, 48))[..., 0]
    terms = rule.TERMS['resnet18']
    rule.check_close(predicted[4][f'maps{n}'], maps, terms)
    rule.check_close(predicted[4][f'scores{n}'], scores, terms, rule.SCORES)


def test_metrics_depend_on_real_images_alone():
    """A split's metrics are those of its own images, undefined ones with a reason."""
    data = split(4)
    maps, scores = data.masks - 0.5, np.where(data.labels, 1.0, -1.0)
    values, reasons = evaluate.evaluate(scores, maps.astype(np.float32), data)
    assert values == pytest.approx(dict.fromkeys(metrics.METRICS, 1.0)) and reasons == {}

    values, reasons = evaluate.evaluate(scores[:1], maps[:1], split(1))
    assert values['I-AUROC'] is None and reasons['I-AUROC']


if __name__ == '__main__':
    np.savez(sys.argv[1], **predictions())
