"""Reading a file builds plain data and runs nothing."""
import ast
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from paramfx.data.images import cifar_dls
from paramfx.data.loading import read_pickle

ROOT = Path(__file__).resolve().parent.parent


class Runs:
    "What an archive could hold that somebody has packed anew"
    def __init__(self, f, *args): self.what = (f, args)
    def __reduce__(self): return self.what


def same(a, b):
    if isinstance(a, np.ndarray): return type(b) is np.ndarray and a.dtype == b.dtype and a.shape == b.shape and (a == b).all()
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


DATA = dict(data=np.arange(24, dtype=np.uint8).reshape(2, 12),
    other=[np.zeros((2, 3), order='F'), np.array(3.), np.array(['ab', 'c']), np.arange(3, dtype='>i4')],
            labels=[1, 2, 3], names=('a', 'é'), raw=b'\x00\xff', nothing=None, number=np.float64(.5), whole=np.int64(-3), flag=True)


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL+1))
def test_plain_data_are_read(tmp_path, protocol):
    fn = tmp_path/'data'
    fn.write_bytes(pickle.dumps(DATA, protocol))
    assert same(DATA, read_pickle(fn))
    read_pickle(fn)['data'][0] = 0 # arrays can be written


def test_the_published_form_is_read(tmp_path):
    "Python 2, protocol 2, NumPy 1: strings of bytes in the place of text, as in the archives of CIFAR"
    fn, raw = tmp_path/'data_batch_1', bytes(range(200, 206))
    fn.write_bytes(
        b'\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x02K\x03\x86'
                   b'cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x06'
                   + raw + b'tbU\x06labelsq\x08]q\x09(K\x03K\x01eu.')
    assert same(dict(data=np.frombuffer(raw, np.uint8).reshape(2, 3), labels=[3, 1]), read_pickle(fn))
    assert same(pickle.loads(fn.read_bytes(), encoding='latin1'), read_pickle(fn))


@pytest.mark.parametrize('what,name', [
    (Runs(os.system, 'touch was_run'), f'{os.name}.system'),
    (Runs(eval, "open('was_run', 'w')"), 'builtins.eval'), (Runs(getattr, 'a', 'b'), 'builtins.getattr'),
    (OrderedDict(a=1), 'collections.OrderedDict'), (Path('a'), 'pathlib')])
def test_nothing_else_is_built(tmp_path, monkeypatch, what, name):
    monkeypatch.chdir(tmp_path)
    for o in (what, [DATA, what], dict(data=what)):
        Path('data').write_bytes(pickle.dumps(o))
        with pytest.raises(ValueError, match=f'data asks for {name}.*nothing of it was run'): read_pickle(Path('data'))
    assert not Path('was_run').exists()


@pytest.mark.parametrize('what', [np.array([DATA], dtype=object), {1, 2}, np.zeros(2, 'M8[s]'), np.zeros(2, [('a', 'u1')]), np.dtype('u1'), np.ndarray])
def test_odd_arrays_are_refused(tmp_path, what):
    fn = tmp_path/'data'
    fn.write_bytes(pickle.dumps(what))
    with pytest.raises(ValueError, match='data is damaged|asks for'): read_pickle(fn)


def test_damaged_ones_are_told_of(tmp_path):
    fn = tmp_path/'data'
    for raw in (b'', b'text', pickle.dumps(DATA)[:-20], b'\x80\x02cnumpy\ndtype\nq\x00U\x02u1\x85R(K\x03U\x01!tb.'):
        fn.write_bytes(raw)
        with pytest.raises(ValueError, match='data is damaged'): read_pickle(fn)
    with pytest.raises(FileNotFoundError, match='gone is missing'): read_pickle(tmp_path/'gone')


def test_cifar_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path/'cifar-10-batches-py'
    folder.mkdir()
    batch = dict(data=np.zeros((10, 3072), np.uint8), labels=list(range(10)))
    for fn in [f'data_batch_{i}' for i in range(1, 6)]+['test_batch']: (folder/fn).write_bytes(pickle.dumps(batch))
    meta = dict(label_names=[str(i) for i in range(10)])
    (folder/'batches.meta').write_bytes(pickle.dumps(meta))
    assert len(cifar_dls(tmp_path, device='cpu').train_ds) == 50
    (folder/'batches.meta').write_bytes(pickle.dumps(meta | dict(more=Runs(os.system, 'touch was_run'))))
    with pytest.raises(ValueError, match='batches.meta asks for'): cifar_dls(tmp_path, device='cpu')
    assert not Path('was_run').exists()


def calls(tree):
    for o in ast.walk(tree):
        if isinstance(o, ast.Call): yield ast.unparse(o.func), {k.arg: ast.unparse(k.value) for k in o.keywords}


@pytest.mark.parametrize('file', sorted([*(ROOT/'paramfx').glob('*.py'), *(ROOT/'benchmarks').glob('*.py')]), ids=lambda f: f'{f.parent.name}/{f.name}')
def test_no_reader_runs_what_it_reads(file):
    "No module reads in a way that may run code: see the table in the notebook on loading"
    for name, kw in calls(ast.parse(file.read_text(encoding='utf8'))):
        assert name not in ('pickle.load', 'pickle.loads', 'cloudpickle.load', 'cloudpickle.loads',
            'load_learner', 'yaml.load', 'yaml.unsafe_load', 'eval', 'exec', 'joblib.load',
                            'torch.jit.load', 'torch.package.PackageImporter', 'pd.read_pickle', 'marshal.loads', 'dill.load'), f'{name} in {file.name}'
        if name == 'torch.load': assert kw.get('weights_only') == 'True', f'torch.load without weights_only=True in {file.name}'
        if name in ('np.load', 'numpy.load'): assert kw.get('allow_pickle', 'False') == 'False'
