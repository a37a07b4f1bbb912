"""What torch.save writes, read without torch: tensors, and nothing that runs."""

import io
import pathlib
import pickle
import pickletools
import struct
import sys
import types
import zipfile

from hypothesis import given, strategies as st
import numpy as np
import pytest
from test_fuzz import BOUNDED, mutated, one_line

from ssn_jax.errors import UserError
from ssn_jax.models import torch_archives

ARRAYS = {
    'a.weight': np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    'a.bias': np.float16([0.5, -2.0]),
    'steps': np.array(7),
    'empty': np.zeros((0, 3), np.float32),
}
STORAGES = {'f4': 'FloatStorage', 'f2': 'HalfStorage', 'i8': 'LongStorage'}


def opcodes(*parts) -> bytes:
    """A pickle by hand: bytes as they are, strings and numbers as a pickle pushes them."""
    content = b'\x80\x02'
    for part in parts:
        match part:
            case bytes():
                content += part
            case str():
                content += b'X' + struct.pack('<I', len(part)) + part.encode()
            case int():
                content += b'J' + struct.pack('<i', part)
    return content + b'.'


def tensor(array: np.ndarray, key: str, strides=None, offset=0, shape=None, size=None) -> tuple:
    """The parts of a pickle that rebuild a tensor, for `opcodes`."""
    strides = [s // array.itemsize for s in array.strides] if strides is None else strides
    numbers = [part for values in (shape or array.shape, strides) for part in (b'(', *values, b't')]
    storage = f'ctorch\n{STORAGES[array.dtype.str[1:]]}\n'.encode()
    size = array.size if size is None else size
    return (
        *(b'ctorch._utils\n_rebuild_tensor_v2\n(', b'(', 'storage', storage, key, 'cpu', size),
        *(b'tQ', offset, *numbers, b'\x89ccollections\nOrderedDict\n)RtR'),
    )


def state_dict(arrays=ARRAYS, **changes) -> bytes:
    """The pickle of arrays by name as torch writes it; `changes` are of the first tensor."""
    parts = [b'ccollections\nOrderedDict\n)R(']
    for i, (name, array) in enumerate(arrays.items()):
        parts += [name, *tensor(array, str(i), **(changes if i == 0 else {}))]
    return opcodes(*parts, b'u', b'}', '_metadata', b'}sb')


def in_zip(content: bytes, compression=zipfile.ZIP_STORED, arrays=ARRAYS) -> bytes:
    """The newer format around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', compression) as archive:
        archive.writestr('weights/data.pkl', content)
        archive.writestr('weights/byteorder', b'little')
        for i, array in enumerate(arrays.values()):
            archive.writestr(f'weights/data/{i}', array.tobytes())
    return file.getvalue()


def in_stream(content: bytes, arrays=ARRAYS) -> bytes:
    """The older format around a pickle."""
    head = [0x1950A86A20F9469CFC6C, 1001, {'protocol_version': 1001, 'little_endian': True}]
    keys = [str(i) for i in range(len(arrays))]
    stored = [struct.pack('<q', x.size) + x.tobytes() for x in arrays.values()]
    head, keys = [pickle.dumps(x, 2) for x in head], pickle.dumps(keys, 2)
    return b''.join([*head, content, keys, *stored])


FORMATS = {'zip': in_zip, 'stream': in_stream}


@pytest.fixture
def read(tmp_path):
    """Writes bytes to a file and reads it."""

    def read(content):
        (tmp_path / 'w.pt').write_bytes(content)
        return torch_archives.read(tmp_path / 'w.pt', '--checkpoint')

    return read


@pytest.mark.parametrize('form', FORMATS)
def test_tensors_are_read_as_they_were_saved(form, read):
    found = read(FORMATS[form](state_dict()))
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_a_view_of_a_storage_is_read(read):
    found = read(in_zip(state_dict(strides=[1, 6, 2], offset=1, shape=(2, 3, 2))))
    expected = np.arange(24)[1:][np.add.outer(np.add.outer([0, 1], [0, 6, 12]), [0, 2])]
    np.testing.assert_array_equal(found['a.weight'], expected)


@pytest.mark.parametrize('zipped', [True, False])
def test_what_torch_itself_writes(zipped, tmp_path):
    torch = pytest.importorskip('torch', reason='compares with PyTorch, where it is installed')
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = layer.state_dict() | {
        'half': torch.ones(2, dtype=torch.bfloat16),
        'parameter': torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T),
    }
    torch.save(state, tmp_path / 'w.pth', _use_new_zipfile_serialization=zipped)
    found = torch_archives.read(tmp_path / 'w.pth', '--checkpoint')
    assert list(found) == list(state)
    for name, value in state.items():
        np.testing.assert_array_equal(found[name].astype(float), value.detach().double().numpy())


SMALL = (b'(', 'storage', b'ctorch\nFloatStorage\n', '0', 'cpu', 24, b'tQ')
REBUILD, HOOKS = b'ctorch._utils\n_rebuild_tensor_v2\n(', b'\x89ccollections\nOrderedDict\n)R'
REFUSED = {
    # A list could grow after its numbers were checked.
    'lists for a shape': (
        opcodes(b'}', 'a', REBUILD, *SMALL, 0, b']q\x01', b']q\x02', HOOKS, b'tRs'),
        'calls torch._utils._rebuild_tensor_v2',
    ),
    'a shape of many axes': (
        opcodes(
            b'}', 'a', REBUILD, *SMALL, 0, b'(', *[1] * 99, b't(', *[0] * 99, b't', HOOKS, b'tRs'
        ),
        'shape that none can have',
    ),
    'a huge number': (
        opcodes(
            *(b'}', 'a', REBUILD, *SMALL, 0),
            *(b'\x8a\x09' + b'\x7f' * 9 + b'\x85K\x01\x85', HOOKS, b'tRs'),
        ),
        'shape that none can have',
    ),
    'numbers for keys': (opcodes(b'}', 1, 2, b's'), 'keys that are no strings'),
    'a negated tensor': (
        opcodes(b'}', 'a', REBUILD, *SMALL, 0, b'K\x02\x85K\x01\x85', HOOKS, b'}', b'tRs'),
        'calls torch._utils._rebuild_tensor_v2',
    ),
    'two types of one storage': (
        opcodes(
            *(b'}', 'a', *tensor(ARRAYS['a.weight'], '0'), b's'),
            *('b', *tensor(np.zeros(2, np.float16), '0'), b's'),
        ),
        'as different ones|of no tensor',
    ),
    'terminal codes': (opcodes(b'cos\x1b[31m\nsystem\n'), r'asks for os\\x1b\[31m'),
    'a call': (opcodes(b'cos\nsystem\n(', 'touch intruded', b'tR'), 'asks for os.system'),
    'a call by a name on the stack': (
        opcodes('builtins', 'eval', b'\x93(', '1', b'tR'),
        'asks for builtins.eval',
    ),
    'an instance': (opcodes(b'(', 'touch intruded', b'ios\nsystem\n'), 'operation INST'),
    'a new object': (opcodes(b'ccollections\nOrderedDict\n)\x81'), 'operation NEWOBJ'),
    'an extension': (opcodes(b'\x82\x01'), 'operation EXT1'),
    'attributes': (opcodes(b'ccollections\nOrderedDict\n}', 'x', 1, b'sb'), 'attributes'),
    'a call of a dict': (opcodes(b'})R'), 'calls something'),
    'arguments of OrderedDict': (
        opcodes(b'ccollections\nOrderedDict\n((', 'a', 1, b'tltR'),
        'operation LIST',
    ),
    'a whole model': (opcodes(b'ctorch.nn.modules.conv\nConv2d\n)R'), 'torch.nn.modules.conv'),
    'no dict': (opcodes(b']'), 'no dict'),
    'a number by name': (opcodes(b'}', 'epoch', 3, b's'), 'epoch is no tensor'),
    'a dict inside': (opcodes(b'}', 'state_dict', b'}s'), 'state_dict is no tensor'),
    'keys that are tuples': (opcodes(b'})', 1, b's'), 'keys that are no strings'),
    'a huge shape': (state_dict(shape=(2**30, 2**30), strides=[0, 0]), 'larger than'),
    'a huge offset': (state_dict(offset=2**30), 'larger than'),
    'a step beyond the end': (state_dict(strides=[12, 4, 9]), 'larger than'),
    'a negative step': (state_dict(strides=[12, 4, -1]), 'shape that none can have'),
    'a negative offset': (state_dict(offset=-1), 'shape that none can have'),
    'fewer steps than axes': (state_dict(strides=[12]), 'shape that none can have'),
    'a negative size': (state_dict(size=-1), 'no storage'),
}


@pytest.mark.parametrize('form', FORMATS)
@pytest.mark.parametrize('name', REFUSED)
def test_whatever_else_a_file_asks_for_is_refused(name, form, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as caught:
        read(FORMATS[form](content))
    assert '\n' not in str(caught.value) and 'w.pt' in str(caught.value)
    assert not (tmp_path / 'intruded').exists()


def test_a_state_dict_of_python_2_is_read(read):
    """Its OrderedDict is given its items at once."""
    parts = tensor(ARRAYS['a.weight'], '0')
    content = opcodes(b'ccollections\nOrderedDict\n(](]', b'(', 'a.weight', *parts, b'eetR')
    found = read(in_zip(content))
    np.testing.assert_array_equal(found['a.weight'], ARRAYS['a.weight'])


def test_what_would_take_more_than_the_file_is_refused(read):
    """Entries that lie in each other, and pickles longer than tensors need."""
    inner = in_zip(state_dict())
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('weights/data.pkl', state_dict())
        archive.writestr('weights/data/0', inner)
        archive.filelist += archive.filelist * 3
    for content, words in (
        (file.getvalue(), 'larger than itself|Duplicate|without one'),
        (in_zip(b'\x80\x02' + b'}' * (2**24 + 1) + b'.'), 'larger than any'),
        (in_stream(b'\x80\x02' + b'}0' * 2**20 + b'.'), 'operation POP|longer than any'),
        (in_stream(b'\x80\x02' + b'}' * (2 * 10**6 + 9) + b'.'), 'longer than any'),
    ):
        with pytest.raises(UserError, match=words):
            read(content)


def test_files_of_another_kind_or_size(read):
    whole = {form: make(state_dict()) for form, make in FORMATS.items()}
    for content, words in (
        (b'', 'no readable PyTorch file'),
        (b'not a pickle', 'no readable PyTorch file'),
        (pickle.dumps({}, 2), 'does not begin'),
        (in_zip(state_dict(), zipfile.ZIP_DEFLATED), 'compressed'),
        (in_zip(state_dict(size=10**9)), 'cut off'),
        (in_stream(state_dict(size=2**30)), 'cut off'),
        (whole['zip'][:-30], 'no readable PyTorch file'),
        (whole['stream'][:-30], 'cut off'),
        (whole['stream'][:200], 'no readable PyTorch file'),
    ):
        with pytest.raises(UserError, match=words) as caught:
            read(content)
        assert '\n' not in str(caught.value)
    with pytest.raises(UserError, match='--checkpoint'):
        torch_archives.read(pathlib.Path('absent.pt'), '--checkpoint')


@BOUNDED
@given(data=st.data(), form=st.sampled_from(sorted(FORMATS)))
def test_mutated_files(data, form, tmp_path):
    content = data.draw(mutated(FORMATS[form](state_dict())))
    (tmp_path / 'w.pt').write_bytes(content)
    found = one_line(lambda: torch_archives.read(tmp_path / 'w.pt', '--checkpoint'))
    # What is read is a view of the file: never more memory than that.
    assert isinstance(found, UserError) or all(x.size <= len(content) for x in found.values())


@BOUNDED
@given(
    st.lists(
        st.sampled_from([op.code.encode('latin1') for op in pickletools.opcodes])
        | st.sampled_from([b'(', b'}', b')', b'ctorch\nFloatStorage\n', b'q\x00', b'h\x00'])
        | st.binary(max_size=4)
        | st.text(max_size=4)
        | st.integers(-2, 9),
        max_size=20,
    ),
    st.sampled_from(sorted(FORMATS)),
)
def test_random_pickles(parts, form):
    """Every operation that a pickle can have, in any order, and no module is imported."""
    before = set(sys.modules)
    file = types.SimpleNamespace(read_bytes=lambda: FORMATS[form](opcodes(*parts)))
    one_line(lambda: torch_archives.read(file, '--checkpoint'))
    assert not {name for name in set(sys.modules) - before if name.startswith('torch')}
