"""What XLA compiles, at the level that users run, against the same in NumPy and float64.

Releases of XLA have computed wrong sums on CPUs, silently and for some sizes alone (jax 0.10.2: of
arrays of more than 32,768 rows). So there are more rows than that wherever NumPy can bear it, and
sizes that no power of two divides. Metrics are not compiled: they are NumPy from the start.
"""

import functools

import in_numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rule

from ssn_jax import config as config_lib, losses, synthesis
from ssn_jax.fused import fold, forward
from ssn_jax.losses import sparse, terms as loss_terms
from ssn_jax.models import backbones, grid as grid_lib, heads, systems
from ssn_jax.models.systems import SimpleNet
from ssn_jax.training import steps

ROWS = (181, 183)  # 33,123 positions.
GRIDS = ((91, 93), (46, 47))  # Of two layers; their feature grid has 182 x 186, 33,852 positions.
KEY = jax.random.key(5)


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def compiled(function, *arguments):
    """What XLA makes of a function as users compile it, whatever tests/conftest.py has set."""
    options = {'xla_backend_optimization_level': 3}
    if jax.__version_info__ < (0, 11):
        options['xla_cpu_use_fusion_emitters'] = True
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)(*arguments)


def check(function, *arguments, terms):
    """Compares each array of a function's with what it is to be; `terms` as of `rule`."""
    actual = jax.tree_util.tree_leaves_with_path(compiled(function, *arguments))
    expected = jax.tree.leaves(in_numpy.evaluate(function, *arguments))
    for (path, a), e in zip(actual, expected, strict=True):
        rule.check_close(a, e, terms, name=jax.tree_util.keystr(path))


# By name: a function, how many terms a value of it has, and its arguments' shapes. The first is as
# the report of the miscompiled sum has it (jax-ml/jax#39103).
POSITIONS = {
    'rows of three': (
        lambda m, x: jax.vmap(lambda r: ((m @ r) ** 2).sum())(x),
        6,
        (3, 3),
        (40960, 3),
    ),
    'noise in bounds': (lambda x: synthesis.bounded_noise(x, 0.1), 2, (*ROWS, 3)),
    # As shares of the normal distribution: in its tails float32 has few values left.
    'static noise': (
        lambda: jax.scipy.special.erf(0.5**0.5 * jax.random.normal(KEY, (*ROWS, 3))),
        16,
    ),
    'spread': (lambda x: synthesis.noise_scales('feature_std', x)[0], 33_123, (*ROWS, 3)),
    'focal loss': (lambda x, y: loss_terms.focal(x, y > 0), 16, ROWS, ROWS),
    'truncated L1': (lambda x, y: loss_terms.truncated_l1(x, y > 0.5), 33_123, ROWS, ROWS),
    'features': (
        lambda *x: grid_lib.upscale_pool(x),
        40,
        *((1, *grid, c) for grid, c in zip(GRIDS, (5, 9), strict=True)),
    ),
    'layer1': (
        lambda *x: grid_lib.select_layers(x, (1, 2)),
        9,
        (1, *ROWS, 3),
        *((1, *grid, 3) for grid in ((91, 92), (46, 46))),
    ),
    'map': (lambda x: grid_lib.full_size_map(x, ROWS), 50, (1, *GRIDS[1], 1)),
    'generator': (
        lambda x, z: synthesis.NoiseGenerator().apply(rule.generator(12, 3), x, z),
        30,
        (1, *ROWS, 12),
        (1, *ROWS, 3),
    ),
}


@pytest.mark.parametrize('name', POSITIONS)
def test_functions_of_positions(name):
    function, terms, *shapes = POSITIONS[name]
    check(function, *(draw(*shape, seed=i) for i, shape in enumerate(shapes)), terms=terms)


@pytest.mark.parametrize('size', [(256, 256), ROWS])
def test_perlin_noise_and_its_masks(size):
    """The noise to rounding errors; masks wherever it is not as near as that to the threshold."""

    def noise(angles):
        drawn = synthesis.perlin_noise(angles, (8, 32), (256, 256))[None, ..., None]
        return drawn if size == (256, 256) else grid_lib.resize(drawn, size)

    check(noise, 3 * draw(33, 33), terms=20)

    def masks(threshold):
        return synthesis.perlin_masks(KEY, 3, size, threshold, 0.1)

    low, high = (in_numpy.evaluate(masks, 0.2 + error) for error in (-1e-5, 1e-5))
    actual = compiled(masks, 0.2)
    assert (actual <= low).all() and (actual >= high).all() and 0.02 < actual.mean() < 0.98


@pytest.mark.parametrize(
    ('name', 'size', 'convolutions'),
    [
        ('resnet18', (361, 365), 15),
        ('wide_resnet50_2', (33, 35), 41),
        ('efficientnet_lite0', (65, 61), 32),
    ],
)
def test_backbones(name, size, convolutions):
    """As published, and folded; the first convolution of ResNet18 has 181 x 183 positions here."""
    terms = convolutions * 9 * 256  # Of the widest 3x3 convolution up to layer3.
    images, variables = draw(1, *size, 3), rule.backbone(name)
    check(lambda x: backbones.BACKBONES[name].apply(variables, x), images, terms=terms)
    fused = fold.fuse_backbone(variables)
    check(lambda x: forward.backbone(fused, x), 128 + 50 * images, terms=terms)


@pytest.mark.parametrize(
    'network',
    [
        systems.SuperSimpleNet('linear', True),
        systems.SuperSimpleNet('conv'),
        systems.SuperSimpleNet(classify=False, waves=6),
        SimpleNet(embedding=96, hidden=64),
    ],
)
def test_the_fused_heads(network):
    channels = getattr(network, 'embedding', 384)
    fused = fold.fuse(rule.backbone('resnet18'), rule.network(network, channels), network)
    layers = tuple(draw(1, *grid, c) for grid, c in zip(GRIDS, (128, 256), strict=True))
    actual = compiled(forward.heads, fused, layers)
    expected = in_numpy.evaluate(forward.heads, fused, layers)
    # A score is one value, of maps and features whose own spread is 1.
    if actual[0] is not None:
        rule.check_close(actual[0], expected[0], 25 * 384 + 33_852, spread=1)
    rule.check_close(actual[1], expected[1], 384 + 1024)


# Settings that between them reach every loss.
GAMES = {
    'direct': {'sparse': False, 'noise.kind': 'learned'},
    'sparse': {'noise.unit': 'feature_std'},
    'conv': {'adaptor': 'conv'},
    'gap_cam': {'system': 'gap_cam', 'supervision.kind': 'labels'},
    'map': {
        **{'image_score': 'map', 'map_loss': 'cross_entropy'},
        **{'product.place': 'same', 'misplaced': 0.5, 'noise.kind': 'learned'},
    },
    'simplenet': {'system': 'simplenet', 'simplenet.embedding': 14, 'simplenet.hidden': 32},
}


@pytest.mark.parametrize('name', GAMES)
def test_losses_and_their_gradients(name, monkeypatch):
    """Losses, running averages, and both players' gradients."""
    config = config_lib.default_config()
    config.noise.std = 0.3
    config.update_from_flattened_dict(GAMES[name])
    config_lib.validate(config)
    images, grids, channels = 2 if name == 'gap_cam' else 1, GRIDS, (5, 9)
    if name == 'direct':  # As wide as it is, at few positions.
        images, grids, channels = 3, ((4, 4), (2, 2)), (128, 256)
    else:  # What NumPy can bear at many: narrow heads, and one program or two instead of four.
        for part, hidden in {'SegmentationHead': 32, 'ClassificationHead': 8, 'CamHead': 8}.items():
            head = functools.partial(getattr(heads, part), hidden)
            monkeypatch.setattr(systems, part, head)
        monkeypatch.setattr(grid_lib, 'split', functools.partial(grid_lib.split, chunk=16))
        surplus = np.array([3.0, np.inf] if name == 'sparse' else [np.inf])
        monkeypatch.setattr(sparse, '_SURPLUS', surplus)
    shapes = [(images, *grid, c) for grid, c in zip(grids, channels, strict=True)]
    batch = {'layers': tuple(jnp.abs(draw(*shape)) for shape in shapes)}
    if name == 'simplenet':
        batch = {'layers': (jnp.asarray(draw(1, *ROWS, 14)),)}
    if name == 'gap_cam':
        batch |= {'label': jnp.array([0.0, 1.0]), 'known': jnp.array([1.0, 0.0])}
    state = steps.init_state(config, jax.random.key(1), sum(channels))
    loss_fn = losses.config_loss(config)

    # Arguments, as in training: XLA would compute in advance whatever follows from constants.
    def both(params, generator, batch, key):
        loss = functools.partial(loss_fn, batch_stats=state.batch_stats, batch=batch, key=key)
        gradient, (terms, averages) = jax.grad(loss, has_aux=True)(params, generator)
        gradients = [gradient]
        if generator:
            of_both = functools.partial(loss, params, stop_map_gradient=False)
            gradients.append(jax.grad(lambda g: of_both(g)[1][0]['generator_loss'])(generator))
        return (terms, averages), gradients

    arguments = state.params, state.generator, batch, KEY
    actual, expected = compiled(both, *arguments), in_numpy.evaluate(both, *arguments)
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(actual[0]), jax.tree.leaves(expected[0]), strict=True
    ):
        rule.check_close(a, e, 4 * 33_852, name=jax.tree_util.keystr(path))
    for a, e in zip(actual[1], expected[1], strict=True):
        rule.check_gradients(a, e)


@pytest.mark.parametrize('precision', ['float32', 'tensorfloat32'])
def test_products_are_as_exact_as_asked_for(precision):
    """Prediction, frozen features and training: GPUs may use TensorFloat-32 unless told not to."""
    config = config_lib.default_config()
    config.precision, config.sparse = precision, False
    network = systems.SuperSimpleNet()
    fused = fold.fuse(rule.backbone('resnet18'), rule.network(network, 384), network)
    images = np.zeros((1, 32, 32, 3), np.uint8)
    state = steps.init_state(config, KEY, 14)
    data = {'layers': (np.zeros((2, 4, 4, 5)), np.zeros((2, 2, 2, 9)))}
    programs = [
        jax.jit(functools.partial(forward.predict, precision=precision)).lower(fused, images),
        jax.jit(functools.partial(forward.backbone, precision=precision)).lower(
            fused.backbone, images
        ),
        steps.make_part(config, 1).lower(state, data, np.zeros((1, 2), int), KEY, 0, 1),
    ]
    for program in programs:
        text = program.as_text()
        products = text.count('stablehlo.dot_general ') + text.count('stablehlo.convolution(')
        marked = text.count('precision = [HIGHEST, HIGHEST]') + text.count(
            'precision_config = [#stablehlo<precision HIGHEST>, #stablehlo<precision HIGHEST>]'
        )
        assert products > 10 and marked == (products if precision == 'float32' else 0)
