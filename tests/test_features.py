"""Frozen features: what is kept of them, where, and that both engines agree on what is trained."""

import errno
import os

import jax
import numpy as np
import pytest
import rule
import tiny

from ssn_jax import files, pipeline
from ssn_jax.config import default_config
from ssn_jax.errors import UserError
from ssn_jax.fused import fold
from ssn_jax.models import resnet, systems
from ssn_jax.training import features as features_lib


def extractor(dtype='float32'):
    """What XLA extracts by ResNet18 with the rule's weights, and the direct form of them."""
    config = default_config()
    config.engine, config.features.dtype = 'xla', dtype
    fused = fold.fuse_backbone(rule.backbone('resnet18'))
    return features_lib.extractor(config, systems.build_network(config), fused, (32, 48))


def test_extracted_features_do_not_depend_on_the_batch():
    """19 images are a batch and three of a second, which is filled up: the direct form's rows."""
    images = np.random.default_rng(0).integers(0, 256, (19, 32, 48, 3), dtype=np.uint8)
    model, variables = resnet.BACKBONES['resnet18'], rule.backbone('resnet18')
    expected = model.apply(variables, resnet.normalise(images))[1:]
    extracted = extractor()(images)
    assert len(extracted) == 2
    for actual, layer in zip(extracted, expected, strict=True):
        rule.check_close(actual, layer, rule.TERMS['resnet18'])


def test_features_kept_in_bfloat16_are_restored():
    """Half the memory, and what comes back is within half of bfloat16's last bit."""
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    exact, kept = extractor()(images), extractor('bfloat16')(images)
    for stored, layer in zip(kept, exact, strict=True):
        assert stored.nbytes == layer.nbytes / 2
        restored = features_lib.restore(stored[1:])
        assert restored.dtype == np.float32
        error = 2 * rule.tolerance(rule.TERMS['resnet18']) * np.std(layer)
        np.testing.assert_allclose(restored, layer[1:], rtol=2**-8, atol=error)
    np.testing.assert_array_equal(features_lib.restore(exact[0]), exact[0])


LIKE = {
    'layer': ((3, 5, 7), np.uint16),
    'mask': ((3, 1), np.float32),
    'none': ((0, 4), np.float32),
}


@pytest.mark.parametrize('free', [0, 2**40])
def test_arrays_lie_in_memory_or_in_a_file_without_a_name(free, tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'free_memory', lambda: free)
    arrays = files.allocate(LIKE, tmp_path)
    assert {name: (x.shape, x.dtype) for name, x in arrays.items()} == LIKE
    for i, x in enumerate(arrays.values()):
        x[:] = i + 1
    assert [x.sum() for x in arrays.values()] == [105, 6, 0]
    with open('/proc/self/maps') as f:
        mapped = str(tmp_path) in f.read()
    assert mapped == (free == 0) and not list(tmp_path.iterdir())
    # JAX takes them as they are: no copy doubles what they need.
    taken = jax.device_put(arrays['layer'])
    assert taken.unsafe_buffer_pointer() == arrays['layer'].ctypes.data


def test_a_disk_without_room_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(files, 'free_memory', lambda: 100)
    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.raises(UserError, match=r'no room .*No space left.*--config\.image_size'):
        files.allocate(LIKE, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_from_the_disk_is_training_from_memory(tmp_path, monkeypatch):
    """The same losses to the last bit; and nothing is left of the file."""
    tiny.write_data(tmp_path / 'data')
    tiny.write_weights(tmp_path / 'resnet18.safetensors')
    losses = {}
    for free in (2**40, 0):
        monkeypatch.setattr(files, 'free_memory', lambda free=free: free)
        config = tiny.config(
            tmp_path, **{'product.angle': 'any', 'turned_copies': 1, 'drawn.count': 24, 'epochs': 2}
        )
        config.update(image_score='map', sparse=True, positions=8, map_loss='cross_entropy')
        workdir = tmp_path / f'run{free}'
        pipeline.train_and_evaluate(config, workdir, quiet=True)
        rows = (workdir / 'train.csv').read_text().splitlines()
        losses[free] = [row.rpartition(',')[0] for row in rows]
    assert losses[0] == losses[2**40] and len(losses[0]) == 3
    kept = {path.suffix for path in workdir.iterdir() if path.is_file()}
    assert kept <= {'.json', '.csv', '.txt', '.safetensors'}
