"""Tensors out of the files that torch.save writes, without torch and without running anything.

A .pt or .pth file is a pickle, which is a program, with the numbers beside it: in a zip archive
since torch 1.6, in one stream before. Here that program is not run. Its operations are read one by
one, and the few that build dicts, numbers, strings and tensors are carried out by this module;
whatever else a file asks for, a call or a class of its own, is refused.
"""

from collections.abc import Callable
import io
import math
import pathlib
import pickletools
from typing import NamedTuple
import zipfile

import ml_dtypes
import numpy as np

from ssn_jax.errors import UserError

# A state dict's pickle has some 25 operations and 200 bytes a tensor: this is for 80,000 of them.
_MOST_OPERATIONS, _MOST_BYTES = 2_000_000, 2**24
_MOST_AXES = 64  # NumPy's bound.

_MAGIC = 0x1950A86A20F9469CFC6C  # What the older format begins with.

_DTYPES = {
    'DoubleStorage': np.float64,
    'FloatStorage': np.float32,
    'HalfStorage': np.float16,
    'BFloat16Storage': ml_dtypes.bfloat16,
    'LongStorage': np.int64,
    'IntStorage': np.int32,
    'ShortStorage': np.int16,
    'CharStorage': np.int8,
    'ByteStorage': np.uint8,
    'BoolStorage': np.bool_,
}
_ORDERED, _TENSOR, _PARAMETER = (
    'collections OrderedDict',
    'torch._utils _rebuild_tensor_v2',
    'torch._utils _rebuild_parameter',
)
_GLOBALS = {_ORDERED, _TENSOR, _PARAMETER} | {f'torch {name}' for name in _DTYPES}


class _Global(NamedTuple):
    """A name that a pickle may mention; what it stands for is never looked up."""

    name: str


class _Storage(NamedTuple):
    """Numbers beside the pickle, by their key."""

    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """Which of a storage's numbers are a tensor's; in numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RefusedError(ValueError):
    """The file holds what is not read here."""


def is_one(path: pathlib.Path) -> bool:
    """Whether a file begins as one of torch.save does, and not as a safetensors file."""
    with path.open('rb') as file:
        head = file.read(9)
    return head.startswith((b'PK', b'\x80')) and not head.endswith(b'{')


def read(path: pathlib.Path, flag: str) -> dict[str, np.ndarray]:
    """The tensors of a state dict by name, of the type that they have there.

    Args:
      path: a file written by torch.save(model.state_dict(), path), in either format.
      flag: what names it on the command line, for messages.

    Raises:
      UserError: there is no such file, it is damaged, or it holds anything but tensors by name.
    """
    try:
        content = path.read_bytes()
    except OSError as e:
        raise UserError(f'{path} cannot be read ({e.strerror}): see to {flag}.') from None
    try:
        tensors = _read_zip(content) if content.startswith(b'PK') else _read_stream(content)
    except _RefusedError as e:
        raise UserError(
            f'{path} cannot be read as tensors alone ({e}): save model.state_dict() by itself.'
        ) from None
    except Exception as e:  # Of a damaged file every step may raise something.
        reason = f'{type(e).__name__}: {_printable(e)}'
        raise UserError(
            f'{path} is no readable PyTorch file ({reason}): fetch it again, or see to {flag}.'
        ) from None
    return tensors


def _read_zip(content: bytes) -> dict[str, np.ndarray]:
    """The newer format: NAME/data.pkl, and every storage in a file NAME/data/KEY."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        # Nothing is compressed by torch, and no entry lies in another one: what is read is no more
        # than there is.
        entries = archive.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
            raise _RefusedError('it is a compressed archive')
        if sum(max(e.compress_size, e.file_size) for e in entries) > len(content):
            raise _RefusedError('its entries are larger than itself')
        pickles = [name for name in archive.namelist() if name.endswith('/data.pkl')]
        if len(pickles) != 1:
            raise _RefusedError('it is an archive without one data.pkl, so not of torch.save')
        if archive.getinfo(pickles[0]).file_size > _MOST_BYTES:
            raise _RefusedError('its pickle is larger than any state dict needs')
        folder = pickles[0].removesuffix('data.pkl')
        if f'{folder}byteorder' in archive.namelist():
            if archive.read(f'{folder}byteorder') != b'little':
                raise _RefusedError('its numbers are big-endian')
        state = _named_tensors(io.BytesIO(archive.read(pickles[0])))
        return _fill(state, lambda storage: archive.read(f'{folder}data/{storage.key}'))


def _read_stream(content: bytes) -> dict[str, np.ndarray]:
    """The older format: five pickles, then of each storage its size and its numbers."""
    file = io.BytesIO(content)
    if _build(file) != _MAGIC:
        raise _RefusedError('it does not begin as a file of torch.save does')
    _build(file)  # The format's version.
    system = _build(file)
    if not isinstance(system, dict) or system.get('little_endian') is not True:
        raise _RefusedError('its numbers are big-endian')
    state, keys = _named_tensors(file), _build(file)
    widths = {t.storage.key: t.storage.dtype.itemsize for t in state.values()}
    stored = {}
    for key in keys:
        if key not in widths:
            raise _RefusedError('it holds numbers of no tensor')
        size = int.from_bytes(file.read(8), 'little')
        start = file.tell()
        file.seek(start + size * widths[key])
        stored[key] = memoryview(content)[start : file.tell()]
    return _fill(state, lambda storage: stored[storage.key])


def _named_tensors(file: io.BytesIO) -> dict[str, _Tensor]:
    """What the pickle of a state dict describes."""
    state = _build(file)
    if not isinstance(state, dict):
        raise _RefusedError('it is no dict of tensors')
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise _RefusedError(f'{_printable(name)} is no tensor by its name')
    return state


def _fill(
    state: dict[str, _Tensor], bytes_of: Callable[[_Storage], bytes]
) -> dict[str, np.ndarray]:
    """The tensors, as views of their storages' numbers."""
    storages, tensors = {}, {}
    for name, (storage, offset, shape, strides) in state.items():
        if storage.key not in storages:
            numbers = np.frombuffer(bytes_of(storage), storage.dtype)
            if len(numbers) != storage.size:
                raise ValueError(f'{_printable(name)} is cut off')
            storages[storage.key] = storage, numbers
        known, numbers = storages[storage.key]
        if known != storage:
            raise _RefusedError('two tensors read the same numbers as different ones')
        tensors[name] = np.lib.stride_tricks.as_strided(
            numbers[offset:], shape, [s * storage.dtype.itemsize for s in strides], writeable=False
        )
    return tensors


def _printable(text: object) -> str:
    """The beginning of a text that a file chose, in a form that no terminal acts on."""
    return ascii(str(text)[:80])[1:-1]


def _build(file: io.BytesIO):
    """What the next pickle of a file describes, by the operations that a state dict needs."""
    stack, marks, memo = [], [], {}

    def since_mark():
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def set_items(pairs):
        target = stack[-1]
        if not isinstance(target, dict) or not all(isinstance(k, str) for k in pairs[::2]):
            raise _RefusedError('a dict of it has keys that are no strings')
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
        name = operation.name
        if number > _MOST_OPERATIONS:
            raise _RefusedError('its pickle is longer than any state dict needs')
        if name in ('PROTO', 'FRAME'):
            pass
        elif name == 'STOP':
            [result] = stack
            return result
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(argument)
        elif name == 'MARK':
            marks.append(len(stack))
        elif name in ('EMPTY_DICT', 'EMPTY_LIST'):
            stack.append({} if name == 'EMPTY_DICT' else [])
        elif name == 'TUPLE':
            stack.append(tuple(since_mark()))
        elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            items = [stack.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(reversed(items)))
        elif name in ('APPEND', 'APPENDS'):
            items = [stack.pop()] if name == 'APPEND' else since_mark()
            if not isinstance(stack[-1], list):
                raise _RefusedError('it appends to what is no list')
            stack[-1].extend(items)
        elif name == 'SETITEM':
            value, key = stack.pop(), stack.pop()
            set_items([key, value])
        elif name == 'SETITEMS':
            set_items(since_mark())
        elif name in ('BINPUT', 'LONG_BINPUT'):
            memo[argument] = stack[-1]
        elif name == 'MEMOIZE':
            memo[len(memo)] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(memo[argument])
        elif name in ('GLOBAL', 'STACK_GLOBAL'):
            if name == 'STACK_GLOBAL':
                argument = ' '.join(reversed([stack.pop(), stack.pop()]))
            if argument not in _GLOBALS:
                raise _RefusedError(f'it asks for {_printable(argument.replace(" ", "."))}')
            stack.append(_Global(argument))
        elif name == 'BINPERSID':
            stack.append(_storage(stack.pop()))
        elif name == 'REDUCE':
            arguments, called = stack.pop(), stack.pop()
            stack.append(_call(called, arguments))
        elif name == 'BUILD':  # A state dict's versions of its modules, which nobody needs.
            stack.pop()
            if not isinstance(stack[-1], dict):
                raise _RefusedError('it sets the attributes of an object')
        else:
            raise _RefusedError(f'its pickle has the operation {name}')
    raise ValueError('cut off')


_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
_LITERALS = {
    *('BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4', 'BINFLOAT'),
    *('BINUNICODE', 'SHORT_BINUNICODE', 'SHORT_BINSTRING', 'BINSTRING'),
}


def _storage(identity) -> _Storage:
    """What a persistent id stands for: ('storage', type, key, device, size, ...)."""
    match identity:
        case ('storage', _Global(name), str(key), str(), int(size), *rest) if (
            name.removeprefix('torch ') in _DTYPES and size >= 0 and rest in ([], [None])
        ):
            return _Storage(key, np.dtype(_DTYPES[name.removeprefix('torch ')]), size)
    raise _RefusedError('it refers to what is no storage of numbers')


def _call(called, arguments):
    """What torch would do for one of the three calls in a state dict."""
    match called, arguments:
        case _Global(name), () if name == _ORDERED:
            return {}
        case _Global(name), (list(pairs),) if name == _ORDERED:  # As Python 2 writes it.
            if not all(
                isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in pairs
            ):
                raise _RefusedError('a dict of it has keys that are no strings')
            return dict(pairs)
        case _Global(name), (_Tensor() as tensor, *_) if name == _PARAMETER:
            return tensor
        # Tuples, which nothing can change after they were checked.
        case (
            _Global(name),
            (_Storage() as storage, int(offset), tuple(shape), tuple(strides), _, _),
        ) if name == _TENSOR:
            if len(shape) != len(strides) or len(shape) > _MOST_AXES:
                raise _RefusedError('a tensor has a shape that none can have')
            numbers = (offset, *shape, *strides)
            if any(type(n) is not int or not 0 <= n < 2**48 for n in numbers):
                raise _RefusedError('a tensor has a shape that none can have')
            last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            if math.prod(shape) > storage.size or (math.prod(shape) and last >= storage.size):
                raise _RefusedError('a tensor is larger than what is stored of it')
            return _Tensor(storage, offset, shape, strides)
    asked = called.name.replace(' ', '.') if isinstance(called, _Global) else 'something'
    raise _RefusedError(f'it calls {asked} in a way that no state dict does')
