"""A run is opened from its folder alone, or one line says why not."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from ssn_jax import config as config_lib, predictor
from ssn_jax.errors import UserError
from ssn_jax.models import weights
from ssn_jax.training import checkpoint, steps


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    return tiny.fake_run(tmp_path_factory.mktemp('runs'), epochs=4, epoch=3)


@pytest.fixture
def copy(workdir, tmp_path):
    return shutil.copytree(workdir, tmp_path / 'run')


def test_everything_a_run_holds(workdir):
    run = predictor.open_run(workdir)
    assert run.config == config_lib.from_json(workdir / 'config.json')
    assert run.epoch == 3 and run.decision is None  # The decision is of epoch 4.
    assert run.origin == run.config.backbone.weights
    expected = steps.init_state(run.config, jax.random.key(1), 384)
    for name in ('params', 'batch_stats'):
        same = jax.tree.map(np.array_equal, run.variables[name], getattr(expected, name))
        assert all(jax.tree.leaves(same))
    maps, scores = predictor.predict(run, np.zeros((3, 64, 64, 3), np.uint8))
    assert (maps.shape, scores.shape) == ((3, 64, 64), (3,))


def test_a_folder_of_several_runs_names_one(tmp_path):
    (tmp_path / 'seed-1').mkdir()
    with pytest.raises(UserError, match=f'{tmp_path} holds several runs.*{tmp_path}/seed-1'):
        predictor.open_run(tmp_path)


def test_a_checkpoint_can_be_chosen(copy):
    config = config_lib.from_json(copy / 'config.json')
    state = steps.init_state(config, jax.random.key(2), 384)
    checkpoint.save(checkpoint.open_manager(copy, 2), 4, state)
    assert [predictor.open_run(copy, epoch).epoch for epoch in (None, 3, 4)] == [4, 3, 4]
    assert predictor.open_run(copy).decision['threshold'] == 0.5
    assert predictor.open_run(copy, 3).decision is None
    with pytest.raises(UserError, match=r'no checkpoint of epoch 7: it has 3, 4\.'):
        predictor.open_run(copy, 7)


def test_overrides_take_the_place_of_the_runs_own(workdir):
    run = predictor.open_run(workdir, overrides={'data.category': 'bolt', 'eval_batch_size': 2})
    assert (run.config.data.category, run.config.eval_batch_size) == ('bolt', 2)
    with pytest.raises(UserError, match='eval_batch_size=0'):
        predictor.open_run(workdir, overrides={'eval_batch_size': 0})


def test_a_run_keeps_the_random_weights_that_it_learned_from(copy, monkeypatch):
    monkeypatch.setattr(weights, 'random_backbone', lambda name: f'random {name}')
    config = config_lib.from_json(copy / 'config.json')
    config.backbone.weights = ''
    (copy / 'config.json').write_text(config_lib.to_json(config))
    (copy / 'results.json').write_text(json.dumps({'weights': weights.RANDOM}))
    run = predictor.open_run(copy)
    assert (run.origin, run.backbone_variables) == (weights.RANDOM, 'random resnet18')


BAD = {
    'nowhere': lambda run: shutil.rmtree(run),
    'no run': lambda run: (run / 'config.json').unlink(),
    'no checkpoint': lambda run: shutil.rmtree(run / 'checkpoints'),
    'newer ssn_jax': lambda run: (run / 'config.json').write_text('{"version": 1000}'),
    'no config': lambda run: (run / 'config.json').write_text('{'),
    'cannot be restored': lambda run: shutil.rmtree(run / 'checkpoints/3/default'),
}
WORDS = {'nowhere': 'no folder'}


@pytest.mark.parametrize('name', BAD)
def test_what_is_no_run_is_one_line(name, copy):
    BAD[name](copy)
    with pytest.raises(UserError, match=WORDS.get(name, name)) as raised:
        predictor.open_run(copy)
    assert str(copy) in str(raised.value) and '\n' not in str(raised.value)


def test_missing_weights_are_one_line(copy):
    with pytest.raises(UserError, match=r'gone\.safetensors'):
        predictor.open_run(copy, overrides={'backbone.weights': str(copy / 'gone.safetensors')})
