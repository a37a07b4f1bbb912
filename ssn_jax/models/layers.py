"""The layers every trained part is made of, initialised as the published implementation does."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

# PyTorch's running-average factor of 0.1 is Flax's momentum of 0.9. Flax averages the biased
# variance and PyTorch the unbiased one; over the positions of a batch (131,072 at 256x256, batch
# 16 doubled) they differ by less than one part in 100,000.
MOMENTUM, EPSILON = 0.9, 1e-5
BatchNorm = functools.partial(
    nn.BatchNorm, momentum=MOMENTUM, epsilon=EPSILON, use_fast_variance=False
)

SLOPE = 0.2  # Of every LeakyReLU.


def _torch_bias(fan_in: int):
    """PyTorch's default bias initialiser: uniform in ±1/sqrt(fan_in)."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dense(nn.Module):
    """A 1x1 convolution on channels-last input (..., C) -> (..., features)."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param('kernel', nn.initializers.xavier_normal(), (x.shape[-1], self.features))
        if not self.use_bias:
            return x @ kernel
        return x @ kernel + self.param('bias', _torch_bias(x.shape[-1]), (self.features,))


def conv2d(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution of x (N, H, W, C) with kernel (k, k, C, D), odd k, zero padding, stride 1.

    XLA's convolution runs on a single thread inside a scan on the CPU (7 times slower than
    outside with its gradient), matrix products do not. So there it is one product of all shifts
    of x if these are few, else one product per kernel row, whose k results are shifted and added.
    """
    if jax.default_backend() != 'cpu':
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
    size, half, channels = kernel.shape[0], kernel.shape[0] // 2, kernel.shape[-1]
    height, width = x.shape[1:3]
    if x.shape[-1] == 1:
        x = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
        shifts = [(i, j) for i in range(size) for j in range(size)]
        patches = [x[:, i : i + height, j : j + width] for i, j in shifts]
        patches = jnp.concatenate(patches, -1).reshape(-1, size * size)
        return (patches @ kernel.reshape(-1, channels)).reshape(*x.shape[:1], height, width, -1)
    out = 0.0
    for i in range(size):
        y = x @ kernel[i].transpose(1, 0, 2).reshape(x.shape[-1], -1)
        y = jnp.pad(y, ((0, 0), (half, half), (half, half), (0, 0)))[:, i : i + height]
        for j in range(size):
            out += y[:, :, j : j + width, j * channels : (j + 1) * channels]
    return out


def depthwise(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """A convolution of each channel by itself, with TensorFlow's 'SAME' padding.

    XLA's own is slow on a CPU, where products of shifted inputs, which it fuses, take a fifth of
    the time.

    Args:
      x: (N, H, W, C).
      kernel: (k, k, 1, C).
      stride: in both directions.

    Returns:
      (N, ceil(H / stride), ceil(W / stride), C).
    """
    if jax.default_backend() != 'cpu':
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
            feature_group_count=x.shape[-1],
        )  # fmt: skip
    size = len(kernel)
    ends = [stride * (-(-n // stride) - 1) + 1 for n in x.shape[1:3]]  # Of the rows that are read.
    missing = [max(end + size - 1 - n, 0) for end, n in zip(ends, x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)))
    return sum(
        x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] * kernel[i, j, 0]
        for i in range(size)
        for j in range(size)
    )


def max_pool(x: jax.Array) -> jax.Array:
    """The largest value of each channel: (N, H, W, C) -> (N, C); its gradient goes to one position.

    The gradient of `x.max((1, 2))` seeks its position by comparing x with the maximum. Where XLA
    computes x twice, in two fusions that round differently, it finds none and divides by zero
    (seen with jax 0.9.2 to 0.10.1 on CPUs).
    """
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    position = jax.lax.stop_gradient(flat).argmax(1, keepdims=True)
    return jnp.take_along_axis(flat, position, 1)[:, 0]


class Conv(nn.Module):
    """A size x size convolution of (N, H, W, C) to (N, H, W, features), zero padding, stride 1."""

    features: int
    size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param('kernel', nn.initializers.xavier_normal(), shape)
        bias = self.param('bias', _torch_bias(self.size**2 * x.shape[-1]), (self.features,))
        return conv2d(x, kernel) + bias
