"Settings that every test shares: headless plots, one thread, quiet bars, and the marks `slow` and `cuda`."
import os
import zlib
from collections import Counter
os.environ['MPLBACKEND'] = 'Agg'  # before anything imports matplotlib

from pathlib import Path

import fastprogress.fastprogress
import pytest
import torch

torch.set_num_threads(1)  # bit-for-bit comparisons must not depend on how a reduction was split
fastprogress.fastprogress.NO_BAR = True

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT/'tests'/'golden'


def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='also run the tests and notebook cells marked slow')


def pytest_configure(config):
    if config.getoption('--slow'): os.environ['PARAMFX_SLOW'] = '1'  # random cases ask for it, when their modules are imported
    config.addinivalue_line('markers', 'slow: takes long; skipped unless --slow is given')
    config.addinivalue_line('markers', 'whole: all cells of this table run, not only those that cover its axes')
    config.addinivalue_line('markers', 'few(n): of this table run n methods, or else n rows of the longest axis; all of them under --slow')
    config.addinivalue_line('markers', 'of(**facts): only methods of which these are true have anything to show here')
    config.addinivalue_line('markers', 'cuda: needs a GPU; skipped without one')


def axes_of(item):
    "A name per `parametrize` of this test: of which row of each it is"
    return getattr(getattr(item, 'callspec', None), '_idlist', ())


def not_of(item):
    "What a mark `of` asks for and the method of this test is not"
    if not (mark := item.get_closest_marker('of')): return ''
    return ', '.join(f'{k}={v}' for k, v in mark.kwargs.items() if getattr(item.callspec.params['m'], k) != v)


def spread(rows, n, shift):
    "`n` of `rows`, evenly, and others in each test"
    return {rows[(i*len(rows)//n+shift)%len(rows)] for i in range(min(n, len(rows)))}


def covering(name, cells):
    """Of the cells of a table, as few as bring each row of each axis, or `few(n)` of the methods or of the longest one.

    A table of methods by networks by optimizers has a few hundred cells; every method, network and optimizer is in some dozen of
    them. These are chosen so that each meets others, in each test others; all pairs run under `--slow`, every night."""
    values, shift = {c: [*enumerate(axes_of(c))] for c in cells}, zlib.crc32(name.encode())
    if few := cells[0].get_closest_marker('few'):
        axes = [[*dict.fromkeys(rows)] for rows in zip(*values.values())]
        methods = [rows for rows in axes if str(cells[0].callspec.params.get('m')) in [v for _, v in rows]]
        kept = spread((methods or [max(axes, key=len)])[0], few.args[0], shift)
        cells = [c for c in cells if not kept.isdisjoint(values[c])]
    at = shift%len(cells)
    left, used, chosen = cells[at:]+cells[:at], Counter(), []
    while missing := {v for c in cells for v in values[c]} - set(used):
        chosen.append(max(left, key=lambda c: (len(missing.intersection(values[c])), -sum(used[v] for v in values[c]))))
        used.update(values[chosen[-1]])
    return chosen


def left_out(items):
    "What of the tables runs under `--slow` only: what covers nothing new, and tables of one axis whole unless they are to be short"
    tables = {}
    for item in items:
        if 'test_golden' in item.nodeid: continue
        n = len(axes_of(item))
        if n > 1 and not item.get_closest_marker('whole') or n == 1 and item.get_closest_marker('few'):
            if not not_of(item): tables.setdefault(item.nodeid.split('[')[0], []).append(item)
    for name, cells in tables.items():
        chosen = {*covering(name, cells)}
        yield from (c for c in cells if c not in chosen)


def pytest_collection_modifyitems(config, items):
    if not config.getoption('--slow'):
        for item in [*left_out(items)]: item.add_marker(pytest.mark.slow)
    for item in items:
        if why := not_of(item): item.add_marker(pytest.mark.skip(reason=f'only for methods with {why}'))
    skip_slow = None if config.getoption('--slow') else pytest.mark.skip(reason='slow: run pytest --slow')
    skip_cuda = None if torch.cuda.is_available() else pytest.mark.skip(reason='cuda: no GPU here')
    for item in items:
        for name, skip in (('slow', skip_slow), ('cuda', skip_cuda)):
            if skip and item.get_closest_marker(name): item.add_marker(skip)


@pytest.fixture(scope='session')
def golden():
    "Folder of the golden vectors"
    return GOLDEN


@pytest.fixture(scope='session')
def data_dir():
    "Folder with the real data sets, named by PARAMFX_DATA"
    path = os.environ.get('PARAMFX_DATA')
    if not path: pytest.skip('PARAMFX_DATA is not set: it names the folder with the real data sets')
    # a wrong path is a mistake, not a wish to skip
    if not Path(path).is_dir(): pytest.fail(f'PARAMFX_DATA={path} is not a folder')
    return Path(path)
