"""What XLA compiles, at the level that users run, against the same in NumPy and float64.

Releases of XLA have computed wrong sums for CPUs, silently and for some sizes alone (jax 0.10.2:
of arrays of more than 32,768 rows). So there are more rows than that here wherever NumPy can bear
it, and sizes that no power of two divides. Metrics are NumPy from the start.
"""

import functools

import in_numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rule

from ssn_jax import config as config_lib, deploy, losses, sparse_loss, steps, synthesis
from ssn_jax.models import features as features_lib, heads, resnet, supersimplenet
from ssn_jax.models.simplenet import SimpleNet

ROWS = (181, 183)  # 33,123 positions.
LAYERS = ((1, 91, 93, 5), (1, 46, 47, 9))  # A feature grid of 182 x 186, 33,852 positions.
KEY = jax.random.key(5)


def draw(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def compiled(function, *arguments):
    """What XLA makes of a function at the level that users run, whatever the tests' is."""
    options = {'xla_backend_optimization_level': 3}
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)(*arguments)


def check(function, *arguments, terms, spread=None):
    """Compares a function's arrays, each relative to its own spread.

    Args:
      function: of arrays.
      *arguments: its arguments.
      terms: how many additions lie behind a value.
      spread: what rounding errors are relative to, for arrays whose values say too little.
    """
    actual = jax.tree_util.tree_leaves_with_path(compiled(function, *arguments))
    expected = jax.tree.leaves(in_numpy.evaluate(function, *arguments))
    for (path, a), e in zip(actual, expected, strict=True):
        rule.check_close(a, e, terms, spread, jax.tree_util.keystr(path))


# By name: a function, how many terms a value of it has, and its arguments' shapes. The first is as
# the report of the miscompiled sum has it.
POSITIONS = {
    'rows of three': (
        lambda m, x: jax.vmap(lambda r: ((m @ r) ** 2).sum())(x),
        6,
        (3, 3),
        (40_960, 3),
    ),
    'noise in a shell': (lambda x: synthesis.shell_noise(x, (0.25, 1.0)), 8, (*ROWS, 3)),
    'noise in bounds': (lambda x: synthesis.bounded_noise(x, 0.1), 2, (*ROWS, 3)),
    'static noise': (lambda x: x + synthesis.static_noise(KEY, x.shape, 0.3), 16, (*ROWS, 3)),
    'spread of channels': (
        lambda x: synthesis.noise_scales('feature_std', x)[0],
        33_123,
        (*ROWS, 3),
    ),
    'focal loss': (lambda x, y: losses.focal(x, y > 0), 16, ROWS, ROWS),
    'truncated L1': (lambda x, y: losses.truncated_l1(x, y > 0.5), 33_123, ROWS, ROWS),
    'features': (lambda *x: features_lib.upscale_pool(x), 40, *LAYERS),
    'layer1': (lambda *x: features_lib.select_layers(x, (1, 2, 3)), 9, (1, *ROWS, 3), *LAYERS),
    'map': (lambda x: features_lib.full_size_map(x, ROWS), 50, (1, 46, 47, 1)),
    'generator': (
        lambda x, z: heads.NoiseGenerator().apply(rule.generator(12, 3), x, z),
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
    """The noise to rounding errors; the masks wherever it is not as near as that to the threshold."""

    def noise(angles):
        drawn = synthesis.perlin_noise(angles, (8, 32), (256, 256))[None, ..., None]
        return drawn if size == (256, 256) else features_lib.resize(drawn, size)

    check(noise, draw(33, 33, scale=3.0), terms=20)

    def masks(threshold):
        return synthesis.perlin_masks(KEY, 3, size, threshold, 0.1)

    low, high = (in_numpy.evaluate(masks, 0.2 + e) for e in (-1e-5, 1e-5))
    actual = compiled(masks, 0.2)
    assert (actual <= low).all() and (actual >= high).all() and 0.02 < actual.mean() < 0.98


# A backbone's depth: what 17 or 29 convolutions of up to 4,608 terms add to the spread of a value.
@pytest.mark.parametrize(
    'name, size, terms', [('resnet18', (361, 365), 40_000), ('wide_resnet50_2', (101, 97), 90_000)]
)
def test_backbones(name, size, terms):
    """ResNet18's first convolution has 181 x 183 positions here."""
    images, variables = draw(1, *size, 3), rule.backbone(name)
    check(lambda x: resnet.BACKBONES[name].apply(variables, x), images, terms=terms)
    fused = (
        deploy.prepare(deploy.fuse_backbone(variables))
        if False
        else deploy.fuse_backbone(variables)
    )
    check(lambda x: deploy.backbone(fused, x), 128 + 50 * images, terms=terms)


@pytest.fixture
def narrow(monkeypatch):
    """A segmentation head that NumPy can bear: 128 hidden channels instead of 1,024."""
    head = functools.partial(heads.SegmentationHead, 128)
    monkeypatch.setattr(supersimplenet, 'SegmentationHead', head)


# Settings that between them reach every loss.
GAMES = {
    'direct': {'sparse': False},
    'sparse': {},
    'learned': {'noise.kind': 'learned', 'noise.unit': 'feature_std', 'adaptor': 'conv'},
    'gap_cam': {'system': 'gap_cam', 'supervision.kind': 'labels'},
    'map': {
        'image_score': 'map',
        'map_loss': 'cross_entropy',
        'noise.shell': (0.25, 1.0),
        'noise.kind': 'learned',
    },
    'simplenet': {'system': 'simplenet', 'simplenet.embedding': 12, 'simplenet.hidden': 128},
}


@pytest.mark.parametrize('name', GAMES)
def test_losses_and_their_gradients(name, narrow, monkeypatch):
    """Both players', and the running averages."""
    monkeypatch.setattr(
        sparse_loss, '_SURPLUS', np.array([3.0, np.inf])
    )  # Two programs are enough.
    config = config_lib.default_config()
    config.noise.std = 0.3
    config.update_from_flattened_dict(GAMES[name])
    config_lib.validate(config)
    layers = tuple(np.abs(draw(*shape)) for shape in LAYERS)
    if name == 'simplenet':
        layers = (draw(1, *ROWS, 12),)
    state = steps.init_state(config, jax.random.key(1), sum(shape[-1] for shape in LAYERS))
    batch = {'layers': layers}
    if name == 'gap_cam':
        batch |= {'label': jnp.ones(1), 'known': jnp.zeros(1)}
    loss_fn = steps.config_loss(config)

    def both(params, generator):
        arguments = state.batch_stats, batch, KEY
        (_, rest), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
            params, generator, *arguments
        )
        if not generator:
            return rest, gradient
        ascend = jax.grad(lambda g: loss_fn(params, g, *arguments, False)[1][0]['generator_loss'])
        return rest, gradient, ascend(generator)

    check(both, state.params, state.generator, terms=70_000)


NETWORKS = {
    'linear': supersimplenet.SuperSimpleNet('linear', True),
    'conv': supersimplenet.SuperSimpleNet('conv'),
    'map': supersimplenet.SuperSimpleNet(classify=False),
    'gap_cam': supersimplenet.GapCam('linear'),
    'simplenet': SimpleNet(embedding=96, hidden=64),
}
