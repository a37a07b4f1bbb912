"""What a JAX function computes, in NumPy and float64: one primitive after the other, uncompiled.

The reference for what XLA compiles, gradients included, since a gradient is traced like anything
else. Random numbers are JAX's own (whole numbers), and what is made of them is computed here.
"""

from collections.abc import Callable
import functools
import math

import jax
from jax.extend.core import Literal
import numpy as np
import scipy.special


def evaluate(function: Callable, *arguments):
    """`function(*arguments)`, a tree of arrays, all floats as float64."""
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    outputs = _run(traced, [_double(x) for x in jax.tree.leaves(arguments)])
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def _is_key(x) -> bool:
    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _double(x):
    if _is_key(x):
        return x
    x = np.asarray(x)
    floating = jax.numpy.issubdtype(x.dtype, np.floating)
    return x.astype(np.float64, copy=False) if floating else x


def _run(closed, arguments):
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.invars, arguments, strict=True))
    values |= zip(jaxpr.constvars, map(_double, closed.consts), strict=True)
    last = {v: i for i, e in enumerate(jaxpr.eqns) for v in e.invars if not isinstance(v, Literal)}
    last |= {v: -1 for v in jaxpr.outvars if not isinstance(v, Literal)}

    def read(v):
        return _double(v.val) if isinstance(v, Literal) else values[v]

    for i, equation in enumerate(jaxpr.eqns):
        inputs = [read(v) for v in equation.invars]
        results = _apply(equation, inputs)
        for v, x in zip(equation.outvars, results, strict=True):
            if not _is_key(x):
                x = _double(x)
                assert x.shape == v.aval.shape, equation.primitive
            values[v] = x
        for v in equation.invars:  # Not to hold everything to the end.
            if not isinstance(v, Literal) and last[v] == i:
                values.pop(v, None)
    return [read(v) for v in jaxpr.outvars]


def _apply(equation, inputs):
    name, params = equation.primitive.name, equation.params
    if name in _NESTED:
        inner = next(params[p] for p in ('jaxpr', 'call_jaxpr', 'fun_jaxpr') if p in params)
        inner = inner if hasattr(inner, 'consts') else jax.extend.core.ClosedJaxpr(inner, ())
        return _run(inner, inputs)
    if name in _CONTROL:
        return _CONTROL[name](inputs, **params)
    if name.startswith('random_') or any(map(_is_key, inputs)):
        # Seeds and random whole numbers.
        results = equation.primitive.bind(*map(jax.numpy.asarray, inputs), **params)
        return results if equation.primitive.multiple_results else [results]
    if name in _SIMPLE:
        return [_SIMPLE[name](*inputs)]
    return [_OTHERS[name](*inputs, **params)]


# --- Control --------------------------------------------------------------------------------------

_NESTED = {'jit', 'pjit', 'closed_call', 'custom_jvp_call', 'custom_vjp_call', 'checkpoint'}


def _cond(inputs, branches, **_):
    return _run(branches[int(np.clip(inputs[0], 0, len(branches) - 1))], inputs[1:])


def _while(inputs, cond_jaxpr, cond_nconsts, body_jaxpr, body_nconsts, **_):
    of_cond, rest = inputs[:cond_nconsts], inputs[cond_nconsts:]
    of_body, carry = rest[:body_nconsts], rest[body_nconsts:]
    while _run(cond_jaxpr, [*of_cond, *carry])[0]:
        carry = _run(body_jaxpr, [*of_body, *carry])
    return carry


def _scan(inputs, jaxpr, length, reverse, ft_in=None, num_consts=0, num_carry=0, **_):
    if ft_in is not None:  # From jax 0.11 on.
        constants, carry, each = map(list, ft_in.update(inputs).unpack())
        num_carry = len(carry)
    else:
        constants, rest = inputs[:num_consts], inputs[num_consts:]
        carry, each = rest[:num_carry], rest[num_carry:]
    rows = []
    for i in reversed(range(length)) if reverse else range(length):
        results = _run(jaxpr, [*constants, *carry, *(x[i] for x in each)])
        carry = results[:num_carry]
        rows.append(results[num_carry:])
    rows = rows[::-1] if reverse else rows
    return [*carry, *(np.stack(x) for x in zip(*rows, strict=True))]


def _sort(inputs, dimension, num_keys, **_):
    assert num_keys == 1
    order = np.argsort(inputs[0], dimension, kind='stable')
    return [np.take_along_axis(x, order, dimension) for x in inputs]


def _split(inputs, sizes, axis):
    return np.split(inputs[0], np.cumsum(sizes)[:-1], axis)


def _unstack(inputs, axis):
    return list(np.moveaxis(inputs[0], axis, 0))


# What returns several arrays.
_CONTROL = {'cond': _cond, 'while': _while, 'scan': _scan, 'sort': _sort}
_CONTROL |= {'split': _split, 'unstack': _unstack}

# --- Value by value, and whole arrays -------------------------------------------------------------

_SIMPLE = {
    'add': np.add,
    'add_any': np.add,
    'sub': np.subtract,
    'mul': np.multiply,
    'div': lambda x, y: x / y if x.dtype == np.float64 else np.trunc(x / y).astype(x.dtype),
    'rem': np.fmod,
    'neg': np.negative,
    'sign': np.sign,
    'abs': np.abs,
    'max': np.maximum,
    'min': np.minimum,
    'pow': np.power,
    'exp': np.exp,
    'log': np.log,
    'log1p': np.log1p,
    'expm1': np.expm1,
    'tanh': np.tanh,
    'sin': np.sin,
    'cos': np.cos,
    'sqrt': np.sqrt,
    'rsqrt': lambda x: 1 / np.sqrt(x),
    'square': np.square,
    'one_minus_square': lambda x: 1 - x**2,
    'logistic': scipy.special.expit,
    'erf': scipy.special.erf,
    'erf_inv': scipy.special.erfinv,
    'floor': np.floor,
    'ceil': np.ceil,
    'is_finite': np.isfinite,
    'eq': np.equal,
    'ne': np.not_equal,
    'lt': np.less,
    'lt_to': np.less,
    'le_to': np.less_equal,
    'le': np.less_equal,
    'gt': np.greater,
    'ge': np.greater_equal,
    'and': np.bitwise_and,
    'or': np.bitwise_or,
    'not': np.invert,
    'xor': np.bitwise_xor,
    'shift_left': np.left_shift,
    'shift_right_logical': np.right_shift,
    'clamp': lambda low, x, high: np.minimum(np.maximum(x, low), high),
    'select_n': lambda which, *cases: np.choose(which.astype(int), cases),
    'copy': np.array,
    'copy_p': np.array,
    'stop_gradient': np.array,
}


def _convert(x, new_dtype, **_):
    floating = jax.numpy.issubdtype(new_dtype, np.floating)
    return x.astype(np.float64 if floating else new_dtype, copy=False)


def _broadcast_in_dim(x, shape, broadcast_dimensions, **_):
    new = [1] * len(shape)
    for size, axis in zip(x.shape, broadcast_dimensions, strict=True):
        new[axis] = size
    return np.broadcast_to(x.reshape(new), shape)


def _pad(x, value, padding_config):
    inner = np.array([c[2] for c in padding_config], int)
    spread = np.full(x.shape + np.maximum(np.array(x.shape, int) - 1, 0) * inner, value)
    spread[tuple(slice(None, None, i + 1) for i in inner)] = x
    added = [(max(low, 0), max(high, 0)) for low, high, _ in padding_config]
    kept = [slice(max(-low, 0), -max(-high, 0) or None) for low, high, _ in padding_config]
    return np.pad(spread, added, constant_values=value)[tuple(kept)]


def _slice(x, start_indices, limit_indices, strides):
    strides = strides or (1,) * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, strides))]


def _window(x, sizes, starts):
    starts = np.clip(np.array(starts, int), 0, np.array(x.shape, int) - sizes)
    return tuple(map(slice, starts, starts + sizes))


def _dynamic_update_slice(x, update, *starts):
    out = x.copy()
    out[_window(x, update.shape, starts)] = update
    return out


def _iota(*_, dtype, shape, dimension, **__):
    new = [1] * len(shape)
    new[dimension] = shape[dimension]
    return np.broadcast_to(np.arange(shape[dimension], dtype=dtype).reshape(new), shape)


def _dot_general(x, y, dimension_numbers, **_):
    (x_sum, y_sum), (x_batch, y_batch) = dimension_numbers

    def arrange(a, summed, batch, last):
        free = [i for i in range(a.ndim) if i not in (*summed, *batch)]
        order = [*batch, *free, *summed] if last else [*batch, *summed, *free]
        sizes = [[a.shape[i] for i in group] for group in (batch, free, summed)]
        n, m, k = map(math.prod, sizes)
        return a.transpose(order).reshape((n, m, k) if last else (n, k, m)), sizes

    x, (batch, x_free, _) = arrange(x, x_sum, x_batch, True)
    y, (_, y_free, _) = arrange(y, y_sum, y_batch, False)
    return (x @ y).reshape(*batch, *x_free, *y_free)


def _conv(x, kernel, window_strides, padding, dimension_numbers, feature_group_count, **params):
    assert feature_group_count == params['batch_group_count'] == 1
    assert set(params['lhs_dilation']) | set(params['rhs_dilation']) == {1}
    x = x.transpose(dimension_numbers.lhs_spec)  # (N, C, ...)
    kernel = kernel.transpose(dimension_numbers.rhs_spec)  # (D, C, ...)
    x = np.pad(x, [(0, 0), (0, 0), *padding])
    out = 0.0
    for tap, window in _taps(x.shape[2:], kernel.shape[2:], window_strides):
        out = out + np.tensordot(kernel[(..., *tap)], x[(..., *window)], (1, 1)).swapaxes(0, 1)
    return out.transpose(np.argsort(dimension_numbers.out_spec))


def _taps(shape, sizes, strides):
    """Each tap of a window, and what it reads while the window moves."""
    counts = [(n - k) // s + 1 for n, k, s in zip(shape, sizes, strides, strict=True)]
    for tap in np.ndindex(*sizes):
        ends = [t + (n - 1) * s + 1 for t, n, s in zip(tap, counts, strides, strict=True)]
        yield tap, tuple(map(slice, tap, ends, strides))


def _reduce_window(start, join, x, window_dimensions, window_strides, padding, **_):
    x = np.pad(x, padding, constant_values=start)
    taps = _taps(x.shape, window_dimensions, window_strides)
    return functools.reduce(join, (x[window] for _, window in taps))


def _cumsum(x, axis, reverse):
    return np.flip(np.cumsum(np.flip(x, axis), axis), axis) if reverse else np.cumsum(x, axis)


# --- Gather and scatter ---------------------------------------------------------------------------


def _places(shape, indices, window, window_axes, inserted, index_to_axis, batching, fill):
    """Where in an array of `shape` a gather reads or a scatter writes, an index array an axis.

    All are shaped like the result (gather) or the updates (scatter); and which are in bounds.
    """
    (of_array, of_indices), rank = batching, indices.ndim - 1 + len(window_axes)
    batch_axes = [i for i in range(rank) if i not in window_axes]
    kept = [i for i in range(len(shape)) if i not in inserted and i not in of_array]
    places, inside = [], np.array(True)
    for axis, size in enumerate(shape):
        place = np.zeros([1] * rank, int)
        if axis in index_to_axis:
            start, most = np.int64(indices[..., index_to_axis.index(axis)]), size - window[axis]
            if fill:
                inside = inside & _along((start >= 0) & (start <= most), batch_axes, rank)
            place = _along(np.clip(start, 0, most), batch_axes, rank)
        if axis in of_array:
            which = batch_axes[of_indices[of_array.index(axis)]]
            place = place + _along(np.arange(size), [which], rank)
        if axis in kept:
            place = place + _along(np.arange(window[axis]), [window_axes[kept.index(axis)]], rank)
        places.append(place)
    return tuple(places), inside


def _along(x, axes, rank):
    shape = [1] * rank
    for axis, size in zip(axes, x.shape, strict=True):
        shape[axis] = size
    return x.reshape(shape)


def _fills(mode):
    return 'FILL' in str(mode)


def _gather(x, indices, dimension_numbers, slice_sizes, mode, fill_value, **_):
    d = dimension_numbers
    batching = d.operand_batching_dims, d.start_indices_batching_dims
    arguments = slice_sizes, d.offset_dims, d.collapsed_slice_dims, d.start_index_map, batching
    places, inside = _places(x.shape, indices, *arguments, _fills(mode))
    if fill_value is None:
        fill_value = np.nan if np.issubdtype(x.dtype, np.floating) else np.iinfo(x.dtype).min
    return np.where(inside, x[places], fill_value).astype(x.dtype)


def _scatter(x, indices, updates, dimension_numbers, mode, add, **_):
    d = dimension_numbers
    without = *d.inserted_window_dims, *d.operand_batching_dims
    kept = [i for i in range(x.ndim) if i not in without]
    window = [1] * x.ndim
    for axis, of_update in zip(kept, d.update_window_dims, strict=True):
        window[axis] = updates.shape[of_update]
    batching = d.operand_batching_dims, d.scatter_indices_batching_dims
    arguments = d.update_window_dims, d.inserted_window_dims, d.scatter_dims_to_operand_dims
    places, inside = _places(x.shape, indices, window, *arguments, batching, True)
    inside = np.broadcast_to(inside, updates.shape)
    places = tuple(np.broadcast_to(p, updates.shape)[inside] for p in places)
    out = x.copy()
    if add:
        np.add.at(out, places, updates[inside])
    else:
        out[places] = updates[inside]
    return out


_OTHERS = {
    'convert_element_type': _convert,
    'reduce_precision': lambda x, **_: x,
    'bitcast_convert_type': lambda x, new_dtype: x.view(new_dtype),
    'integer_pow': lambda x, y: x**y,
    'sharding_constraint': lambda x, **_: x,
    'broadcast_in_dim': _broadcast_in_dim,
    'reshape': lambda x, new_sizes, **_: x.reshape(new_sizes),
    'transpose': lambda x, permutation: x.transpose(permutation),
    'squeeze': lambda x, dimensions: x.squeeze(dimensions),
    'expand_dims': lambda x, dimensions: np.expand_dims(x, dimensions),
    'concatenate': lambda *x, dimension: np.concatenate(x, dimension),
    'tile': lambda x, reps: np.tile(x, reps),
    'stack': lambda *x, axis: np.stack(x, axis),
    'pad': _pad,
    'slice': _slice,
    'dynamic_slice': lambda x, *starts, slice_sizes: x[_window(x, slice_sizes, starts)],
    'dynamic_update_slice': _dynamic_update_slice,
    'rev': lambda x, dimensions: np.flip(x, dimensions),
    'iota': _iota,
    'reduce_sum': lambda x, axes, **_: x.sum(axes),
    'reduce_max': lambda x, axes, **_: x.max(axes),
    'reduce_min': lambda x, axes, **_: x.min(axes),
    'reduce_and': lambda x, axes, **_: x.all(axes),
    'reduce_or': lambda x, axes, **_: x.any(axes),
    'argmax': lambda x, axes, index_dtype: x.argmax(*axes).astype(index_dtype),
    'argmin': lambda x, axes, index_dtype: x.argmin(*axes).astype(index_dtype),
    'cumsum': _cumsum,
    'dot_general': _dot_general,
    'conv_general_dilated': _conv,
    'reduce_window_max': functools.partial(_reduce_window, -np.inf, np.maximum),
    'reduce_window_sum': functools.partial(_reduce_window, 0.0, np.add),
    'gather': _gather,
    'scatter': functools.partial(_scatter, add=False),
    'scatter-add': functools.partial(_scatter, add=True),
}
