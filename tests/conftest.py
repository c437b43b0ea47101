"Settings that every test shares: headless plots, one thread, quiet bars, and the marks `slow` and `cuda`."
import os
import zlib
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
    config.addinivalue_line('markers', 'few(n): n rows of this table run, spread evenly; all of them under --slow')
    config.addinivalue_line('markers', 'cuda: needs a GPU; skipped without one')


def axes_of(item):
    "A name per `parametrize` of this test: of which row of each it is"
    return getattr(getattr(item, 'callspec', None), '_idlist', ())


def repeated(items):
    """Of the cells of each table of several axes, those that bring no value of any axis for the first time.

    A table of methods by networks by optimizers has a few hundred cells; every method, network and optimizer is in some dozen of
    them. The other pairs run under `--slow`, every night."""
    tables = {}
    for item in items:
        axes = axes_of(item)
        if len(axes) < 2 or item.get_closest_marker('whole') or 'test_golden' in item.nodeid: continue
        tables.setdefault(item.nodeid.split('[')[0], []).append(item)
    for cells in tables.values():
        seen = set()
        for item in cells:
            values = set(enumerate(axes_of(item)))
            if values <= seen: yield item
            seen |= values


def left_over(items):
    "Of tables of one axis that are marked `few(n)`, all but n rows: spread evenly, and others in each test"
    tables = {}
    for item in items:
        if item.get_closest_marker('few') and len(axes_of(item)) == 1: tables.setdefault(item.nodeid.split('[')[0], []).append(item)
    for name, rows in tables.items():
        n, shift = rows[0].get_closest_marker('few').args[0], zlib.crc32(name.encode())
        kept = {(i*len(rows)//n+shift)%len(rows) for i in range(n)}
        yield from (r for i, r in enumerate(rows) if i not in kept)


def pytest_collection_modifyitems(config, items):
    if not config.getoption('--slow'):
        for item in [*repeated(items), *left_over(items)]: item.add_marker(pytest.mark.slow)
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
