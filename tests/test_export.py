"""An exported file computes what the predictor does, where this package is not installed."""

import json
import os
import subprocess
import sys

import cv2
from hypothesis import given, settings, strategies as st
import numpy as np
import onnxruntime
import pytest
import tiny

from ssn_jax import cli, config as config_lib, export, predictor, run as run_lib
from ssn_jax.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 51, 90, 3), np.uint8)
BATCHES = (1, 7)

# Run in an empty folder by a Python that has neither this package nor its tests on its path.
LOAD = """
import json, sys, zipfile
import jax, numpy
file, arrays = sys.argv[1:]
with zipfile.ZipFile(file) as archive:
    predictor = jax.export.deserialize(archive.read('predictor'))
    metadata = json.loads(archive.read('metadata.json'))
given, results = numpy.load(arrays), {}
for name in given:
    results['scores' + name], results['maps' + name] = predictor.call(given[name])
numpy.savez('results.npz', **results)
assert not {'flax', 'ssn_jax', 'orbax', 'cv2', 'optax'} & set(sys.modules)
print(json.dumps(metadata))
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return predictor.open_run(tiny.fake_run(tmp_path_factory.mktemp('export'), threshold=0.25))


@pytest.fixture(scope='module')
def expected(run):
    """Scores and maps by the predictor for this machine."""
    return run.logits(fitted(run))


def fitted(run):
    """The images as the predictor takes them."""
    return np.asarray(export.preprocess(run.config, IMAGES)).astype(np.uint8)


def call(name, *arguments):
    """Runs a command in this process."""
    cli.COMMANDS[name]([str(x) for x in arguments])


def check_metadata(written):
    assert written['threshold'] == 0.25
    assert written['threshold_probability'] == pytest.approx(1 / (1 + np.exp(-0.25)))
    assert written['classes'] == ['normal', 'defective']
    assert written['image_size'] == [64, 64]
    assert written['commit'] == run_lib.commit() != ''


def check_arrays(actual, expected, allowed=1e-4):
    for a, b in zip(actual, expected, strict=True):
        b = np.asarray(b)[: len(a)]
        assert a.dtype == np.float32 and a.shape == b.shape
        assert np.abs(a - b).max() < allowed


def check_onnx(session, run):
    """Images of the model's size, and others, whose levels may fall on the other side of a half."""
    for images, allowed in ((fitted(run), 1e-4), (IMAGES, 5e-3)):
        for batch in BATCHES:
            found = session.run(None, {'images': images[:batch]})
            check_arrays(found, run.logits(fitted(run)), allowed)


@pytest.mark.slow
def test_stablehlo_needs_jax_alone(run, expected, tmp_path):
    file = tmp_path / 'made' / 'nut.zip'
    call('export', '--workdir', run.workdir, '--format', 'stablehlo', '--output', file, '--quiet')
    assert os.listdir(file.parent) == ['nut.zip']
    np.savez(tmp_path / 'images.npz', **{str(batch): IMAGES[:batch] for batch in BATCHES})
    done = subprocess.run(
        [sys.executable, '-P', '-c', LOAD, str(file), str(tmp_path / 'images.npz')],
        cwd=tmp_path,
        env={name: v for name, v in os.environ.items() if name != 'PYTHONPATH'},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    check_metadata(json.loads(done.stdout))
    results = np.load(tmp_path / 'results.npz')
    for batch in BATCHES:
        check_arrays([results[f'{x}{batch}'] for x in ('scores', 'maps')], expected)


@pytest.mark.slow
def test_onnx_of_the_other_backbone_with_layer1(tmp_path):
    fields = {'features.layers': (1, 2, 3), 'image_score': 'map'}
    fields |= {'backbone.name': 'efficientnet_lite0', 'backbone.weights': ''}
    run = predictor.open_run(tiny.fake_run(tmp_path, threshold=0.25, **fields))
    session = onnxruntime.InferenceSession(export.to_onnx(run))
    check_onnx(session, run)


@pytest.mark.slow
def test_onnx_in_onnxruntime(run, tmp_path):
    file = tmp_path / 'nut.onnx'
    call('export', '--workdir', run.workdir, '--format', 'onnx', '--output', file, '--quiet')
    session = onnxruntime.InferenceSession(file)
    written = session.get_modelmeta().custom_metadata_map
    check_metadata({name: json.loads(value) for name, value in written.items()})
    assert [x.name for x in session.get_inputs()] == ['images']
    assert [x.name for x in session.get_outputs()] == ['scores', 'maps']
    check_onnx(session, run)
    newer = onnxruntime.InferenceSession(export.to_onnx(run, opset=20))
    check_onnx(newer, run)
    with pytest.raises(UserError, match=r'--opset=12 cannot be used: it is in 17\.\.'):
        export.to_onnx(run, opset=12)


@pytest.mark.parametrize(
    'epochs, threshold, said',
    [
        (1, 0.25, ''),
        (3, 0.25, 'this is epoch 1 of 3, and there is no threshold (no decision on epoch 1), so'),
        (1, None, ': there is no threshold (made up), so the file holds none.'),
    ],
)
def test_what_is_not_finished_is_said(epochs, threshold, said, run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(export, 'to_onnx', lambda model, opset: b'')
    config = run.config.copy_and_resolve_references()
    config.epochs = epochs
    decided = {'threshold': threshold, 'undefined': 'made up'} if epochs == 1 else None
    model = predictor.Predictor(config, run.fused, 1, decided, run.workdir)
    export.write(model, 'onnx', tmp_path / 'nut.onnx')
    assert [r.getMessage().count(said) for r in caplog.records] == ([1] if said else [])


@settings(max_examples=10, deadline=None)
@given(size=st.tuples(st.integers(1, 90), st.integers(1, 90)), seed=st.integers(0, 99))
def test_images_are_resized_as_by_opencv(size, seed):
    """To the one level by which OpenCV's weights of 11 bits round; not at all where halved."""
    config = config_lib.default_config()
    config.update(image_size=(40, 30), resize=(48, 40))
    for height, width in (size, (96, 80)):
        image = np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), np.uint8)
        resized = np.asarray(export.preprocess(config, image), int)[0]
        expected = cv2.resize(image[0], (40, 48), interpolation=cv2.INTER_LINEAR)[4:44, 5:35]
        assert np.abs(resized - expected).max() <= ((height, width) != (96, 80))
