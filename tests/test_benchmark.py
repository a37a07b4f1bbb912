"""Times of inference: rows, ratios and the table, and anomalib's models where it is installed."""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json

import numpy as np
import pytest

from ssn_jax import benchmark, cli, config as config_lib
from ssn_jax.errors import UserError
from ssn_jax.report import published

OURS = {'engine': 'openvino', 'image_size': [32, 32], 'params': 2_000_000, 'gflop': 1.5}
PEER = OURS | {'name': 'STFPM', 'published': published.PEERS['STFPM']}


def asked(**changes):
    """What the command is given, as `cli.benchmark` hands it on."""
    values = {'configs': ['auto'], 'against': None, 'precisions': ['float32'], 'batches': [1]}
    return argparse.Namespace(**values | {'turns': 7, 'xla': False, 'json': True} | changes)


def fails(images):
    raise RuntimeError(f'\nno such operation, on {len(images)} images\nand a long trace')


@pytest.fixture
def rows(monkeypatch):
    """Measured rows of made-up forms, whose times are 1, 2, 4, ... ms and rise by turns."""
    monkeypatch.setattr(benchmark, '_has_bfloat16', lambda: True)
    monkeypatch.setattr(
        benchmark,
        'take_turns',
        lambda calls, turns: (
            1e-3 * np.outer(2.0 ** np.arange(len(calls)), np.linspace(1, 2, turns))
        ),
    )
    precisions = ('float32', 'bfloat16')
    forms = [
        (OURS | {'name': name, 'precision': p}, lambda images: lambda: None)
        for name, p in itertools.product(('auto', 'mod1_a'), precisions)
    ]
    forms += [(PEER | {'precision': p}, lambda images: lambda: None) for p in precisions]
    forms += [(PEER | {'engine': 'torch', 'precision': 'float32'}, fails)]
    return benchmark.measure(forms, 3, 5)


def test_the_configs_that_it_measures_by_itself(monkeypatch):
    monkeypatch.setattr(benchmark, 'run', lambda arguments: {'configs': arguments.configs})
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cli.benchmark(['--json'])
    names = json.loads(printed.getvalue())['configs']
    assert len(names) > 3 and set(names) <= set(config_lib.built_in())


def test_rows_have_times_and_ratios(rows):
    assert json.loads(json.dumps(rows)) == rows
    for row in rows[:-1]:
        assert row.keys() >= {'name', 'engine', 'precision', 'batch', 'ms', 'ms_p95', 'faster'}
        assert row['batch'] == 3 and row['ms'] < row['ms_p95']
    np.testing.assert_allclose([row['ms'] for row in rows[:-1]], 1.5 * 2.0 ** np.arange(6))
    # Against ours at the same precision: the third row, of mod1_a, takes four times auto's.
    assert rows[2]['faster'] == pytest.approx({'auto': 4, 'mod1_a': 1})
    assert rows[4]['faster'] == pytest.approx({'auto': 16, 'mod1_a': 4})
    assert rows[5]['faster'] == pytest.approx({'auto': 16, 'mod1_a': 4})


def test_what_cannot_be_converted_says_so_in_its_row(rows):
    assert rows[-1]['failed'] == 'no such operation, on 3 images' and 'ms' not in rows[-1]
    assert benchmark.table(rows)[-1].endswith('no such operation, on 3 images')


def test_our_own_mistakes_are_raised():
    with pytest.raises(RuntimeError, match='no such operation'):
        benchmark.measure([(OURS | {'name': 'auto', 'precision': 'float32'}, fails)], 1, 1)


def test_without_bfloat16_there_is_none(monkeypatch):
    monkeypatch.setattr(benchmark, '_has_bfloat16', lambda: False)
    form = OURS | {'name': 'auto', 'precision': 'bfloat16'}, lambda images: lambda: None
    (row,) = benchmark.measure([form], 1, 1)
    assert row['failed'] == 'this processor has no bfloat16'


def test_the_table_lists_published_accuracy(rows):
    head, *lines = (line.split() for line in benchmark.table(rows))
    words = 'engine precision M params GFLOP I-AUROC AUPRO batch ms 95 % auto mod1_a'
    assert head == words.split()
    assert lines[0][:8] == ['auto', 'openvino', 'float32', '2.0', '1.5', '-', '-', '3']
    assert lines[4][:8] == ['STFPM', 'openvino', 'float32', '2.0', '1.5', '95.5', '92.1', '3']
    assert lines[4][-2:] == ['16.00', '4.00']
    fast = [row | {'published': published.PEERS['FastFlow']} for row in rows[:1]]
    assert benchmark.table(fast)[1].split()[5:7] == ['99.4', '-']


def test_all_run_in_every_turn_and_are_timed_once():
    called = []
    seconds = benchmark.take_turns([lambda: called.append(0), lambda: called.append(1)], 3)
    assert seconds.shape == (2, 3) and (seconds >= 0).all()
    assert called == [0, 0, 1, 1] * 3


@pytest.mark.parametrize('absent', ['anomalib', 'torch'])
def test_without_anomalib_the_error_says_how_to_install_it(absent, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n: None if n == absent else find(n))
    with pytest.raises(UserError, match=f'needs .*{absent}.*pip install torch') as caught:
        benchmark.run(asked(against='anomalib'))
    assert '\n' not in str(caught.value)


def test_our_own_networks_are_measured():
    found = benchmark.run(asked(configs=['edge']))
    (row,) = found['rows']
    assert row['name'] == 'edge' and row['backbone'] == 'efficientnet_lite0'
    assert row['precision'] == 'float32' and 0 < row['ms'] <= row['ms_p95']
    assert row['faster'] == {'edge': 1.0}
    assert 'jax' in found['machine'] and 'core' in found['machine']


@pytest.mark.slow
def test_the_models_of_anomalib_are_measured():
    """All of them, and OpenVINO computes what PyTorch does."""
    pytest.importorskip('anomalib', reason="measures anomalib's models, where it is installed")
    from ssn_jax import peers

    assert peers.MODELS.keys() == published.PEERS.keys()
    forms = peers.forms(['float32'])
    images = benchmark.embedded_images(2, (256, 256))
    for (row, in_openvino), (_, in_torch) in zip(forms[::2], forms[1::2], strict=True):
        for actual, expected in zip(in_openvino(images)(), in_torch(images)(), strict=True):
            assert actual.shape == expected.shape and np.isfinite(expected).all(), row['name']
            # OpenVINO's FastFlow is off by a fiftieth, the others by float32's rounding.
            allowed = 0.05 if row['name'] == 'FastFlow' else 1e-4
            error = np.abs(actual - expected).max() / np.abs(expected).max()
            assert error < allowed, (row['name'], error)
    ours = benchmark.our_forms('auto', ['openvino'], ['float32'])
    rows = benchmark.measure(ours + forms, 1, 1)
    assert len(rows) == 13 and not [row for row in rows if 'failed' in row]
    assert all(row['ms'] > 0 and row['faster']['auto'] > 0 for row in rows)
