"Settings that every test shares: headless plots, one thread, quiet bars, and the marks `slow` and `cuda`."
import os
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
    config.addinivalue_line('markers', 'slow: takes long; skipped unless --slow is given')
    config.addinivalue_line('markers', 'cuda: needs a GPU; skipped without one')


def pytest_collection_modifyitems(config, items):
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
