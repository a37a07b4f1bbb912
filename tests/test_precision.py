"""In which precision a run infers: what is measured, what is chosen, and what cannot be had."""

import importlib.util
import io
import json
import shutil
import types
import zipfile

import jax
import numpy as np
import onnxruntime
import pytest
from test_supervision import make_split
import tiny

from ssn_jax import (
    cli,
    config as config_lib,
    evaluate,
    export,
    pipeline,
    precision,
    predictor,
    run as run_lib,
)
from ssn_jax.data import images
from ssn_jax.errors import UserError
from ssn_jax.fused import engine

pytestmark = pytest.mark.usefixtures('small_programs')

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run that was measured in int8, and its results."""
    workdir = tiny.fake_run(tmp_path_factory.mktemp('int8'), precision='int8')
    return workdir, tiny.finish(workdir)


def test_a_run_in_int8(finished):
    """What it changed is written down, and everything after it infers as it decided."""
    workdir, results = finished
    assert set(results['precisions']) == {'float32', 'int8'}
    exact, coarse = (results['precisions'][name] for name in ('float32', 'int8'))
    assert exact['change'] == 0 < coarse['change'] and min(exact['ms'], coarse['ms']) > 0
    assert results['decision']['precision'] == 'int8' and results['engine'].endswith('int8')
    assert results['metrics'] == coarse['metrics'] and set(exact['metrics']) == set(
        coarse['metrics']
    )
    assert results['decision']['threshold'] == coarse['threshold'] != exact['threshold']

    model = predictor.open_run(workdir)
    assert model.precision == 'int8'
    scores, maps = model.logits(IMAGES)
    expected, expected_maps = predictor.open_run(workdir, None, {'precision': 'float32'}).logits(
        IMAGES
    )
    assert (scores != expected).any()
    # Coarse, and of random weights: alike is all that can be said.
    assert np.corrcoef(maps.ravel(), expected_maps.ravel())[0, 1] > 0.5


def test_scores_move_to_another_precision_and_back(finished, tmp_path):
    """However often the run's command is given: never twice by the same."""
    workdir, results = shutil.copytree(finished[0], tmp_path / 'run'), finished[1]
    known = {'int8': run_lib.read_scores(workdir).of('train').score}
    for name in ('float32', 'float32', 'int8'):
        config = run_lib.read_config(workdir)
        config.precision = name
        again = pipeline.train_and_evaluate(config, workdir, quiet=True)
        assert again['decision']['precision'] == name
        expected = results['precisions'][name]['threshold']
        assert again['decision']['threshold'] == pytest.approx(expected, abs=1e-5)
        found = run_lib.read_scores(workdir).of('train').score
        np.testing.assert_allclose(found, known.setdefault(name, found), atol=1e-5)
    assert np.abs(known['int8'] - known['float32']).min() > 1e-4


def test_the_export_of_a_run_in_int8(finished, tmp_path):
    """Both files in a folder of their own are all that OpenVINO needs."""
    workdir, results = finished
    files = {name: tmp_path / f'{name}.xml' for name in ('int8', 'float32')}
    for name, file in files.items():
        cli.COMMANDS['export'](
            [
                *('--workdir', str(workdir), '--format', 'openvino', '--precision', name),
                *('--output', str(file), '--quiet'),
            ]
        )
        network = engine.read(file)
        about = {key: json.loads(x.value) for key, x in network.get_rt_info()['ssn_jax'].items()}
        assert about['precision'] == name and about['precisions'] == results['precisions']
        assert about['threshold'] == results['decision']['threshold']
        expected = predictor.open_run(workdir, None, {'precision': name}).logits(IMAGES)
        found = engine.OpenVino(network, (64, 64))(IMAGES)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    size, exact = (file.with_suffix('.bin').stat().st_size for file in files.values())
    assert size < 0.5 * exact
    for wrong, said in (
        (['onnx', '--output', str(tmp_path / 'x')], 'onnx has no int8: take openvino'),
        (['stablehlo', '--output', str(tmp_path / 'x')], 'stablehlo has no int8'),
        (['openvino', '--output', str(tmp_path / 'x')], 'it ends in .xml'),
        (['openvino', '--opset', '20', '--output', str(tmp_path / 'x.xml')], 'is of --format onnx'),
    ):
        with pytest.raises(UserError, match=said):
            cli.COMMANDS['export'](['--workdir', str(workdir), '--format', *wrong])
    assert not list(tmp_path.glob('x*'))


def test_a_network_that_knows_positions_in_int8(tmp_path):
    """The position code's part is a constant of two dimensions, which NNCF takes for no bias."""
    fields = {'product.place': 'same', 'image_score': 'map', 'precision': 'int8'}
    model = predictor.open_run(tiny.fake_run(tmp_path, **fields)).at('float32')
    assert model.fused.network.waves
    exact = model.logits(IMAGES)[1]
    coarse = precision.settle(model.at('int8'), IMAGES)[0]
    assert coarse.precision == 'int8'
    assert np.corrcoef(coarse.logits(IMAGES)[1].ravel(), exact.ravel())[0, 1] > 0.5


def test_the_score_of_a_padded_image_is_of_its_own_pixels(tmp_path):
    """In every engine and precision, and in exported files; maps reach into the margin."""
    fields = {'fit': 'pad', 'image_score': 'map', 'precision': 'int8', 'image_size': (64, 96)}
    run = predictor.open_run(tiny.fake_run(tmp_path, **fields))
    rng, shapes = np.random.default_rng(0), [(20, 200), (300, 40), (65, 97), (4, 400)]
    frames = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    fitted = np.stack([run.fit(frame) for frame in frames])
    precision.settle(run, fitted)
    exact = run.at('float32')
    with zipfile.ZipFile(io.BytesIO(export.to_stablehlo(exact))) as archive:
        stablehlo = jax.export.deserialize(archive.read('predictor')).call
    onnx = onnxruntime.InferenceSession(export.to_onnx(exact))
    predictions = {
        'openvino': exact.logits,
        'int8': run.logits,
        'onnx': lambda images: onnx.run(None, {'images': images}),
        'stablehlo': stablehlo,
    }
    exact.config.engine = 'xla'
    predictions['xla'] = predictor.Predictor(exact.config, exact.fused).logits
    parts = [images.inside(shape, (64, 96)) for shape in shapes]
    for name, predict in predictions.items():
        scores, maps = (np.asarray(x) for x in predict(fitted))
        own = [logits[part].max() for logits, part in zip(maps, parts, strict=True)]
        assert scores.tolist() == own, name
        assert (scores < maps.max((1, 2)) - 1e-3).any(), name
        # All of it grey: no pixel is its own, and its score is a number all the same.
        assert np.isfinite(predict(np.broadcast_to(images.GREY, fitted.shape).copy())[0]).all()


def test_another_model_takes_int8_with_it(finished, tmp_path):
    """What was quantised of other weights is deleted when they change."""
    workdir = shutil.copytree(finished[0], tmp_path / 'run')
    stored = run_lib.read_model(workdir)
    run_lib.write_model(workdir, stored)
    assert (workdir / predictor.INT8).exists()
    run_lib.write_model(workdir, run_lib.Model(stored.backbone, stored.network, 2))
    assert not (workdir / predictor.INT8).exists()


def test_auto_is_the_fastest_that_changes_little(tmp_path, monkeypatch, capsys):
    workdir = tiny.fake_run(tmp_path, precision='auto')
    model = predictor.open_run(workdir, None, {'precision': 'auto'})
    expected = {'float32', 'int8'} | ({'bfloat16'} if engine.has_bfloat16() else set())
    for tolerated in (-1.0, np.inf):
        monkeypatch.setattr(precision, '_TOLERATED', tolerated)
        settled, tried = precision.settle(model, IMAGES)
        assert set(tried) == expected
        fastest = min(tried, key=lambda name: tried[name]['ms'])
        assert settled.precision == ('float32' if tolerated < 0 else fastest)
    assert capsys.readouterr().out == ''  # What quantises would show its progress there.


def test_a_run_infers_in_what_it_decided_in(tmp_path, caplog):
    """Whatever its config.json says by now, or an older decision.json does not."""
    workdir = tiny.fake_run(tmp_path, precision='auto')
    assert predictor.open_run(workdir).precision == 'float32'
    predictor.open_run(workdir, None, {'precision': 'tensorfloat32'})
    assert 'was chosen in float32: in tensorfloat32' in caplog.text
    caplog.clear()
    decided = json.loads((workdir / 'decision.json').read_text())
    (workdir / 'decision.json').write_text(json.dumps(decided | {'precision': 'bfloat16'}))
    assert predictor.open_run(workdir).config.precision == 'bfloat16'
    assert 'was chosen in' not in caplog.text
    assert predictor.open_run(workdir, None, {'precision': 'float32'}).precision == 'float32'
    assert 'was chosen in bfloat16' in caplog.text


def test_scores_without_a_spread_are_not_compared(tmp_path):
    """Of one image, or of the same one, nothing says how much a change is."""
    model = predictor.open_run(tiny.fake_run(tmp_path), None, {'precision': 'auto'})
    for count in (1, 3):
        settled, tried = precision.settle(model, np.repeat(IMAGES[:1], count, 0))
        assert settled.precision == 'float32' and tried['int8']['change'] is None
        json.dumps(tried, allow_nan=False)


@pytest.mark.slow
def test_training_with_a_precision_for_what_is_finished(tmp_path):
    """Trains as float32 does, to the last bit, and goes on with a run that was trained so."""
    tiny.write_data(tmp_path / 'data')
    tiny.write_weights(tmp_path / 'resnet18.safetensors')

    def losses(name):
        return (tmp_path / name / 'train.csv').read_text().rpartition(',')[0]

    for name in ('float32', 'int8', 'auto'):
        config = tiny.config(tmp_path, precision=name)
        results = pipeline.train_and_evaluate(config, tmp_path / name, quiet=True)
        assert name == 'float32' or set(results['precisions']) >= {'float32', 'int8'}
    first = losses('float32')
    assert losses('int8') == losses('auto') == first
    again = pipeline.train_and_evaluate(config, tmp_path / 'float32', quiet=True)
    assert set(again['precisions']) >= {'float32', 'int8'} and losses('float32') == first


def test_a_damaged_int8_form_is_told(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / 'run')
    (workdir / 'int8.bin').unlink()
    with pytest.raises(UserError, match=r'int8.xml or int8.bin beside it cannot be read'):
        predictor.open_run(workdir).logits(IMAGES)


def test_int8_that_is_not_there(tmp_path):
    workdir = tiny.fake_run(tmp_path)
    with pytest.raises(UserError, match=r'no int8 form of epoch 1.*--config.precision=int8'):
        predictor.open_run(workdir, None, {'precision': 'int8'}).logits(IMAGES)
    with pytest.raises(UserError, match='int8 needs OpenVINO'):
        predictor.open_run(workdir, None, {'precision': 'int8', 'engine': 'xla'}).logits(IMAGES)


def test_what_int8_needs_is_told_before_training(monkeypatch):
    config = config_lib.default_config()
    config.precision = 'int8'
    precision.check(config)
    config.engine = 'xla'
    with pytest.raises(UserError, match='needs OpenVINO'):
        precision.check(config)
    config.engine = 'auto'
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r"needs nncf.*'ssn_jax\[int8\]'"):
        precision.check(config)


def test_what_infers_changes_no_training(tmp_path):
    config = tiny.config(tmp_path)
    workdir = tiny.fake_run(tmp_path)
    for name in ('int8', 'auto'):
        config.precision = name
        run_lib.check_workdir(config, workdir)
        assert config_lib.training_precision(config) == 'float32'
    config.precision = 'bfloat16'
    with pytest.raises(UserError, match='different: precision'):
        run_lib.check_workdir(config, workdir)


@pytest.mark.parametrize('image_score', ['map', 'head'])
def test_what_was_scored_in_another_precision_is_moved(image_score):
    """Scores by the mean difference, and maxima of maps where they are the scores."""
    split, config = make_split([0, 1, 0, 1]), config_lib.default_config()
    config.image_score = image_score

    def model(precision, moved):
        def logits(images):
            return images[:, 0, 0, 0] + moved, images[..., 0] + moved

        return types.SimpleNamespace(precision=precision, logits=logits)

    models = model('int8', np.float32(0.5)), model('float32', np.float32(0))
    known = evaluate.as_scores(split, np.zeros(4, np.float32), np.ones(4, np.float32), '1')
    judged = pipeline.judge(config, *models, known, split.images[:2], split)
    train = judged.all_scores.of('train')
    assert train.score.tolist() == [0.5] * 4
    assert train.map_maximum.tolist() == [1.5 if image_score == 'map' else 1.0] * 4
