"""Nothing that was downloaded or handed over is run: the sources have no means to."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / 'ssn_jax').rglob('*.py'), *(ROOT / 'scripts').glob('*.py')])
# A config is code, and the README says so; of the package's own only names are taken.
CONFIGS = {'ssn_jax/config.py': 'exec_module'}


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: path.name)
def test_sources_neither_unpickle_nor_evaluate(path):
    name = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name.split('.')[0] for alias in node.names}
            modules |= {getattr(node, 'module', None)}
            assert not modules & {'pickle', 'marshal', 'shelve', 'dill', 'joblib', 'yaml'}
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert called not in ('eval', 'exec', '__import__', 'compile', 'os.system')
        assert 'True' not in (options.get('allow_pickle'), options.get('shell'))
        if called == 'torch.load':
            assert options['weights_only'] == 'True'
        if called.endswith('exec_module'):
            assert CONFIGS.get(name) == 'exec_module'
