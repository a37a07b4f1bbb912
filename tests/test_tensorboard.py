"""Event files hold what train.csv and results.json hold, however often a run was resumed."""

import importlib.util

import pytest
import tiny

from ssn_jax import pipeline, run as run_lib
from ssn_jax.errors import UserError


def test_rows_appear_once_after_a_resume(tmp_path):
    pytest.importorskip('tensorboardX')
    file, events = tmp_path / 'train.csv', tmp_path / 'tensorboard'
    log = run_lib.Log(file, 0, events)
    for epoch in (1, 2, 3):
        log.append(epoch, {'loss': 1 / epoch})
    # Killed after epoch 3, resumed from a checkpoint of epoch 2.
    log = run_lib.Log(file, 2, events)
    log.append(3, {'loss': 7.0})
    log.close(3, {'AUPRO': 0.5, 'AP-loc': None})
    assert {key: round(value, 5) for key, value in tiny.scalars(events).items()} == {
        ('train/loss', 1): 1.0,
        ('train/loss', 2): 0.5,
        ('train/loss', 3): 7.0,
        ('test/AUPRO', 3): 0.5,
    }


def test_without_the_package_one_line_says_so_before_anything_is_done(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    missing = lambda name: None if name == 'tensorboardX' else find_spec(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, 'find_spec', missing)
    with pytest.raises(UserError, match=r"pip install -e '\.\[tensorboard\]'"):
        pipeline.train_and_evaluate(tiny.config(tmp_path), tmp_path / 'run', events=True)
    assert not list(tmp_path.iterdir())
