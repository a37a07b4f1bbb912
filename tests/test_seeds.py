"""Several seeds at once: each is the run that it would have been alone."""

import csv
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ssn_jax import config as config_lib, metrics, pipeline, run as run_lib, seeds
from ssn_jax.data import sampling
from ssn_jax.errors import UserError
from ssn_jax.report import text as text_lib
from ssn_jax.training import steps

pytestmark = pytest.mark.usefixtures('small_programs')


def tiny_config(kind, sparse=True):
    config = config_lib.default_config()
    config.epochs, config.batch_size, config.decision.parts = 2, 4, 2
    config.noise.kind, config.noise.std, config.noise.discriminator_steps = kind, 0.3, 1
    config.sparse = sparse
    return config


def epochs_of(config, numbers):
    """Two epochs of two steps for the given seeds at once: their states and losses."""
    rng = np.random.default_rng(0)
    shapes = ((8, 4, 4, 5), (8, 2, 2, 7))
    batch = {'layers': tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)}
    each = [steps.init_state(config, jax.random.key(n), 12) for n in numbers]
    several = len(numbers) > 1
    run_epoch = steps.make_epoch(config, 2, several=several)
    state, losses = steps.stack_states(each), []
    for i in range(2):
        order = np.asarray(steps.stack([sampling.uniform_order(n, i, 8, 4) for n in numbers]))
        keys = steps.stack([jax.random.fold_in(jax.random.key(n), i) for n in numbers])
        state, values = run_epoch(state, batch, order, keys)
        losses.append([float(one['loss']) for one in steps.unstack(values, len(numbers))])
    return steps.unstack_states(state, len(numbers)), np.array(losses)


@pytest.mark.slow
def test_epochs_of_two_seeds_are_those_of_each():
    config = tiny_config('learned', sparse=False)
    states, losses = epochs_of(config, [3, 4])
    (state,), alone = epochs_of(config, [4])
    np.testing.assert_allclose(losses[:, 1], alone[:, 0], rtol=1e-4)
    assert np.all(np.abs(losses[:, 0] - losses[:, 1]) > 1e-3)
    assert int(states[1].step) == int(state.step) == 4
    # AdamW turns the rounding of gradients that are zero into steps: compared is the whole update.
    before = steps.init_state(config, jax.random.key(4), 12)
    trees = [{'p': s.params, 'g': s.generator} for s in (states[1], state, before)]
    together, single, before = (
        jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in trees
    )
    moved = jnp.linalg.norm(single - before)
    assert moved > 0 and jnp.linalg.norm(together - single) < 0.2 * moved


@pytest.mark.slow
def test_what_is_a_choice_for_one_seed_is_one_for_several():
    """No select between all programs: as many conditionals as one seed's epoch has."""
    config = tiny_config('learned')
    layers = (jnp.zeros((8, 4, 4, 5)), jnp.zeros((8, 2, 2, 7)))
    counts = []
    for numbers in ([0], [0, 1]):
        state = steps.stack_states([steps.init_state(config, jax.random.key(0), 12)] * len(numbers))
        order = steps.stack([np.zeros((2, 4), np.int32)] * len(numbers))
        keys = steps.stack([jax.random.key(0)] * len(numbers))
        run = steps.make_part(config, 2, several=len(numbers) > 1)
        text = run.lower(state, {'layers': layers}, order, keys, 0, 2).as_text()
        counts.append(text.count('stablehlo.case') + text.count('stablehlo.if'))
    assert counts[0] == counts[1] > 0


# Whole runs


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('seeds')
    tiny.write_data(folder / 'data')
    tiny.write_weights(folder / 'w.safetensors')
    return folder


def run_config(folder):
    config = tiny_config('static', sparse=False)  # Compiles in half the time.
    config.image_size = (64, 64)
    config.backbone.weights = str(folder / 'w.safetensors')
    config.data.update(category='nut', root=str(folder / 'data'), cache=str(folder / 'cache'))
    config.checkpoint.every, config.seed = 1, 3
    return config


def losses_of(workdir):
    with (workdir / 'train.csv').open(newline='') as f:
        rows = list(csv.DictReader(f))
    assert [int(row['epoch']) for row in rows] == [1, 2]
    return [float(row['loss']) for row in rows]


@pytest.mark.slow
def test_each_seed_leaves_the_run_it_would_have_been_alone(folder, tmp_path):
    config = run_config(folder)
    config.seeds = 2
    both = tmp_path / 'both'
    summary = pipeline.train_and_evaluate(config, both)
    assert {p.name for p in both.iterdir()} == {'seed-3', 'seed-4', 'summary.json'}
    assert summary == json.loads((both / 'summary.json').read_text())

    single = run_config(folder)
    single.seed = 4
    results = pipeline.train_and_evaluate(single, tmp_path / 'alone')
    theirs = json.loads((both / 'seed-4' / 'results.json').read_text())
    assert results.keys() == theirs.keys()
    for name in metrics.METRICS:
        assert theirs['metrics'][name] == pytest.approx(results['metrics'][name], abs=1e-3)
        values = summary['metrics'][name]['values']
        assert values[1] == theirs['metrics'][name]
        assert summary['metrics'][name]['mean'] == pytest.approx(np.mean(values))
        assert summary['metrics'][name]['std'] == pytest.approx(np.std(values, ddof=1))
    np.testing.assert_allclose(
        losses_of(both / 'seed-4'), losses_of(tmp_path / 'alone'), rtol=1e-4, atol=1e-5
    )
    for name in ('config.json', 'checkpoints', 'figures', 'decision.json'):
        assert (both / 'seed-4' / name).exists()
    alone = (tmp_path / 'alone' / 'config.json').read_text()
    assert (both / 'seed-4' / 'config.json').read_text() == alone
    table = text_lib.format_table(summary)
    assert 'seeds 3 to 4' in table and ' ± ' in table

    # One seed is complete, the other was stopped after an epoch: only that one goes on.
    before = (both / 'seed-3' / 'train.csv').read_bytes()
    losses = losses_of(both / 'seed-4')
    shutil.rmtree(both / 'seed-4' / 'checkpoints' / '2')
    again = pipeline.train_and_evaluate(config, both)
    assert (both / 'seed-3' / 'train.csv').read_bytes() == before
    np.testing.assert_allclose(losses_of(both / 'seed-4'), losses, rtol=1e-4, atol=1e-5)
    for name in metrics.METRICS:
        assert again['metrics'][name]['values'] == pytest.approx(
            summary['metrics'][name]['values'], abs=1e-3
        )


def test_a_folder_of_something_else_is_refused(tmp_path):
    config = config_lib.default_config()
    config.seeds = 2
    (tmp_path / 'seed-0').mkdir()
    (tmp_path / 'summary.json').write_text('')
    runs = seeds.runs_of(config, tmp_path)
    assert [(c.seed, c.seeds, w.name) for c, w in runs] == [(0, 1, 'seed-0'), (1, 1, 'seed-1')]
    assert config.seeds == 2
    (tmp_path / 'thesis.tex').write_text('')
    with pytest.raises(UserError, match=r'thesis\.tex.*--workdir'):
        seeds.runs_of(config, tmp_path)
    (tmp_path / 'config.json').write_text('')
    with pytest.raises(UserError, match=r'a single run.*--workdir'):
        seeds.runs_of(config, tmp_path)


@pytest.mark.parametrize(
    'values, words',
    [
        ({'seeds': 0}, r'--config\.seeds=0'),
        ({'seeds': 2, 'seed': 2**32 - 1}, r'--config\.seeds=2'),
        (
            {'seeds': 2, 'supervision.kind': 'masks', 'supervision.mask_fraction': 0.5},
            r'--config\.seeds.*mask_fraction=1',
        ),
    ],
)
def test_seeds_that_can_not_train_together(values, words, tmp_path):
    config = config_lib.default_config()
    config.update_from_flattened_dict(values)
    with pytest.raises(UserError, match=words):
        pipeline.train_and_evaluate(config, tmp_path / 'run')
    assert not list(tmp_path.iterdir())


def test_summary_of_an_undefined_metric():
    base = {'config': 'a', 'data': 'b', 'category': 'c', 'embedded': False, 'epochs': 2}
    values = dict.fromkeys(metrics.METRICS, 0.5) | {'AUPRO': None}
    results = [
        base | {'seed': s, 'metrics': values, 'undefined': {'AUPRO': 'no masks'}} for s in (0, 1)
    ]
    summary = seeds.summarise(results)
    assert summary['metrics']['AUPRO'] is None
    assert isinstance(text_lib.format_summary(summary), str)
    lines = text_lib.format_summary(summary).splitlines()
    assert any('AUPRO' in line and 'no masks' in line for line in lines)
    assert any('50.00 ± 0.00 %' in line for line in lines)
    assert pathlib.Path('runs') / 'mod1_a-embedded-screw-seeds' == run_lib.default_workdir(
        _several(config_lib.default_config())
    )


def test_a_summary_is_of_all_seeds_that_are_there(tmp_path):
    """Seeds that were added later stand beside the first ones; another config's do not."""
    config = config_lib.default_config()
    fields = {'config': 'a', 'data': 'b', 'category': 'c', 'embedded': False, 'epochs': 300}
    fields |= {'metrics': dict.fromkeys(metrics.METRICS, 0.5), 'undefined': {}}
    for seed, epochs in ((0, 300), (1, 300), (2, 5), (3, 300)):
        other = config.copy_and_resolve_references()
        other.seed, other.epochs = seed, epochs
        (tmp_path / f'seed-{seed}').mkdir()
        (tmp_path / f'seed-{seed}' / 'config.json').write_text(config_lib.to_json(other))
        text = json.dumps(fields | {'seed': seed})
        (tmp_path / f'seed-{seed}' / 'results.json').write_text(text)
    config.seed, config.seeds = 3, 2
    config.features.place = 'host'  # Where features lie changes no result.
    text = json.dumps(fields | {'seed': 4, 'data_sha256': {'test': 'of other images'}})
    (tmp_path / 'seed-4').mkdir()
    other.seed = 4
    (tmp_path / 'seed-4' / 'config.json').write_text(config_lib.to_json(other))
    (tmp_path / 'seed-4' / 'results.json').write_text(text)
    others = seeds.other_results(seeds.runs_of(config, tmp_path), tmp_path, fields)
    assert sorted(r['seed'] for r in others) == [0, 1]
    summary = seeds.summarise([fields | {'seed': seed} for seed in (4, 0, 3)])
    assert summary['seeds'] == [0, 3, 4]
    assert 'seeds 0, 3, 4,' in text_lib.format_summary(summary)


@pytest.mark.parametrize(
    ('name', 'root', 'category', 'folder'),
    [
        ('mvtec_ad', '', 'nut', 'mod1_a-embedded-nut-0'),
        ('mvtec_ad', 'x', 'nut', 'mod1_a-mvtec_ad-nut-0'),
        ('ksdd2', '', 'nut', 'mod1_a-embedded-surface-0'),
        ('ksdd2', 'x', 'nut', 'mod1_a-ksdd2-0'),
        ('folder', 'x/bolts', 'nut', 'mod1_a-folder-bolts-0'),
        ('synthetic', '', 'nut', 'mod1_a-embedded-nut-0'),
    ],
)
def test_a_run_goes_to_a_folder_of_its_own(name, root, category, folder):
    config = config_lib.default_config()
    config.data.update(name=name, root=root, category=category)
    assert run_lib.default_workdir(config) == pathlib.Path('runs') / folder


def _several(config):
    config.seeds = 2
    return config


def test_a_folder_of_several_seeds_stands_for_its_runs(tmp_path):
    for name in ('many/seed-1', 'many/seed-0', 'one'):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / 'one' / 'config.json').write_text('{}')
    many = [tmp_path / 'many' / 'seed-0', tmp_path / 'many' / 'seed-1']
    assert run_lib.single_runs(tmp_path / 'many') == many
    assert run_lib.single_runs(tmp_path / 'one') == [tmp_path / 'one']
    assert run_lib.single_runs(tmp_path / 'none') == [tmp_path / 'none']
    for name in ('a=2/seed-0', 'a=1/seed-1', 'a=1/seed-0'):
        (tmp_path / 'swept' / name).mkdir(parents=True)
        if name != 'a=2/seed-0':  # It has failed.
            (tmp_path / 'swept' / name / 'results.json').write_text('{}')
    swept = [tmp_path / 'swept' / 'a=1' / 'seed-0', tmp_path / 'swept' / 'a=1' / 'seed-1']
    assert run_lib.single_runs(tmp_path / 'swept') == swept


def test_a_damaged_result_of_another_seed_is_left_out(tmp_path, caplog):
    """What was trained is summarised all the same, and the damaged file is named."""
    config = config_lib.default_config()
    values = {'metrics': dict.fromkeys(metrics.METRICS, 0.5), 'undefined': {}, 'config': 'a'}
    values |= {'data': 'b', 'category': 'c', 'embedded': False, 'epochs': 300}
    for seed, text in enumerate(['{}', '', '{"seed": 2', json.dumps(values | {'seed': 3}), 'null']):
        single = config.copy_and_resolve_references()
        single.seed = seed
        (tmp_path / f'seed-{seed}').mkdir()
        (tmp_path / f'seed-{seed}' / 'config.json').write_text(config_lib.to_json(single))
        (tmp_path / f'seed-{seed}' / 'results.json').write_text(text)
    found = seeds.other_results([(config, tmp_path / 'seed-0')], tmp_path, values)
    assert [results['seed'] for results in found] == [3]
    for seed in (1, 2, 4):
        assert f'seed-{seed}' in caplog.text
