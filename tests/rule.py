"""The rule by which the reference files' inputs and parameters are rebuilt.

Every array follows from a name: its CRC-32 seeds a generator, which draws the array. Names and
shapes of parameters are PyTorch's.
"""

import functools
import pathlib
import zlib

from flax import traverse_util
import jax
import numpy as np

from ssn_jax.models import weights
from ssn_jax.models.systems import GapCam, SimpleNet, SuperSimpleNet
from ssn_jax.synthesis import NoiseGenerator

FOLDER = pathlib.Path(__file__).parent / 'reference'

# How many additions lie behind a value of a backbone, and of what follows it: convolutions one
# after the other, none larger than a 3x3 one of 256 channels, or a 1x1 one of 672.
TERMS = {'resnet18': 15 * 9 * 256, 'wide_resnet50_2': 41 * 9 * 256, 'efficientnet_lite0': 32 * 672}

# The spread of a network's scores, which is not to be had from two or three of them: a score is a
# sum of 128 or 258 terms w_k x_k, where w_k has variance 1/128 or 1/258 and x_k is about 1.
SCORES = 1.0


def reference(name: str) -> dict[str, np.ndarray]:
    """The arrays of a reference file."""
    with np.load(FOLDER / f'{name}.npz') as arrays:
        return dict(arrays)


def tolerance(terms: int) -> float:
    """How far float32 may be from the exact value, relative to the spread of such values.

    Each of `terms` additions rounds by at most half a unit in the last place, 2^-24, up or down: a
    random walk, whose deviation is the root of their number. Of millions of values none is further
    than six deviations from where it should be.
    """
    return 6 * 2**-24 * terms**0.5


def check_close(actual, expected, terms: int, spread=None, name: str = '') -> None:
    """Asserts that float32 values are those of a reference but for rounding.

    A reference that is float32 itself (a published array, OpenCV's, another form of the same) has
    rounded too, so twice as much is allowed then.

    Args:
      actual: an array.
      expected: of the same shape; float32, or else exact.
      terms: how many additions lie behind a value, one after the other or in a sum.
      spread: what errors are relative to, besides the value itself: a number, or one for each; by
        default the root mean square of the expected values, which says little where these are few
        and may lie near zero.
      name: what is compared.
    """
    allowed = tolerance(terms) * (1 + (np.asarray(expected).dtype == np.float32))
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, name
    if spread is None:
        spread = np.sqrt(np.mean(expected**2))
    # A value beyond the spread rounds in its own last place.
    scale = np.maximum(spread + np.abs(expected), np.finfo(float).tiny)
    error = (np.abs(actual - expected) / scale).max(initial=0)
    assert error <= allowed, (name, error, allowed)


def check_gradients(actual, expected, tolerance: float = 3e-3) -> None:
    """Asserts that a tree of gradients is that of an exact reference, array by array.

    Rounding takes a value over the kink of a ReLU now and then, and with it that position's share
    of the gradient, so whole arrays are compared: the norm of their difference, relative to their
    own or to a tenth of the largest one's (the bias before a BatchNorm has gradient 0).
    """
    paths = jax.tree_util.tree_leaves_with_path(expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    largest = max((np.linalg.norm(x) for _, x in paths), default=0)
    for (path, e), a in zip(paths, jax.tree.leaves(actual), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        error = np.linalg.norm(a - e) / max(np.linalg.norm(e), 0.1 * largest, 1e-300)
        assert a.shape == e.shape and error <= tolerance, (jax.tree_util.keystr(path), error)


def draw_input(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An input by its name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape).astype(np.float32)


def draw_parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter by its full PyTorch name, in PyTorch's layout."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    last = name.split('.')[-1]
    if last == 'running_var':
        value = rng.uniform(0.5, 1.5, shape)
    elif last in ('running_mean', 'bias'):
        value = 0.1 * rng.standard_normal(shape)
    elif len(shape) == 1:
        value = rng.uniform(0.5, 1.5, shape)
    else:
        value = rng.standard_normal(shape) * np.sqrt(1 / np.prod(shape[1:]))
    return value.astype(np.float32)


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """PyTorch's shape of the parameter `name`, whose shape here is `shape`."""
    if len(shape) == 4:
        return shape[3], shape[2], shape[0], shape[1]
    if len(shape) == 2:  # A linear layer, or a 1x1 convolution.
        linear = any(part in name for part in ('fc_score', '.0fc.', '.body.', '.tail.'))
        return shape[::-1] if linear else (*shape[::-1], 1, 1)
    return shape


def torch_layout(name: str, value) -> np.ndarray:
    """A parameter of this project in PyTorch's layout."""
    value = np.asarray(value)
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    return value.T.reshape(torch_shape(name, value.shape))


def by_torch_name(variables: dict, name_of) -> dict[str, np.ndarray]:
    """Variables as a PyTorch state_dict: arrays in PyTorch's layout by PyTorch's names."""
    flat = traverse_util.flatten_dict(variables)
    return {name_of(path): torch_layout(name_of(path), value) for path, value in flat.items()}


def tensors(template: dict, name_of, prefix: str = '') -> dict[str, np.ndarray]:
    """The rule's state_dict for a tree of shapes."""
    flat = traverse_util.flatten_dict(template)
    return {
        name_of(path): draw_parameter(
            prefix + name_of(path), torch_shape(name_of(path), leaf.shape)
        )
        for path, leaf in flat.items()
    }


def backbone_tensors(name: str) -> dict[str, np.ndarray]:
    """The rule's state_dict of a backbone."""
    return tensors(weights.backbone_template(name), weights.backbone_name, name + '/')


@functools.cache
def backbone(name: str) -> dict:
    """The rule's variables of a backbone."""
    return weights.port(
        backbone_tensors(name), weights.backbone_template(name), weights.backbone_name, 'the rule'
    )


def network(model: SuperSimpleNet | GapCam | SimpleNet, channels: int) -> dict:
    """The rule's variables of a trained network for features of `channels` channels."""
    features = jax.ShapeDtypeStruct((1, 8, 8, channels), np.float32)
    template = jax.eval_shape(model.init, jax.random.key(0), features)
    return weights.port(
        tensors(template, weights.head_name), template, weights.head_name, 'the rule'
    )


def generator(channels: int, z_dim: int) -> dict:
    """The rule's variables of the noise generator."""
    shapes = [jax.ShapeDtypeStruct((1, 8, 8, c), np.float32) for c in (channels, z_dim)]
    template = jax.eval_shape(NoiseGenerator().init, jax.random.key(0), *shapes)
    return weights.port(
        tensors(template, weights.head_name), template, weights.head_name, 'the rule'
    )
