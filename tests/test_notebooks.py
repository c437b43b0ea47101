"""Every notebook runs against the library as exported.

`nbdev-test` runs the exported cells themselves in IPython, so an import that the module lacks goes unnoticed and the
library is never covered. Here each exported cell is replaced by the names of its module."""
from pathlib import Path

import pytest
from execnb.shell import CaptureShell
from fastcore.nbio import read_nb
from nbdev.test import nb_test_cells

NBS = Path(__file__).resolve().parent.parent/'nbs'
EXPORTS = 'export', 'exports', 'exporti'
ADOPT = "import importlib as _il; globals().update({{k: v for k, v in vars(_il.import_module('{}')).items() if not k.startswith('__')}})"


def notebooks():
    return [p for p in sorted(NBS.rglob('*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(NBS).parts)]


def default_exp(fn):
    "Module the notebook exports to, if any"
    return next((c.directives['default_exp'] for c in read_nb(fn).cells
                 if c.cell_type == 'code' and 'default_exp' in c.directives), None)


def sources(fn, slow=False):
    "Sources of the cells to run, each exported cell replaced by the names of its module"
    default, seen = default_exp(fn), set()
    for cell in nb_test_cells(fn, ['slow'], ['slow'] if slow else []):
        directives = getattr(cell, 'directives_', None) or {}
        key = next((k for k in EXPORTS if k in directives), None)
        if key is None: yield cell.source; continue
        mod = directives[key] or default
        if mod not in seen:  # once: later cells may rebind a name on purpose
            seen.add(mod)
            yield ADOPT.format(f'paramfx.{mod}')


@pytest.mark.parametrize('fn', notebooks(), ids=lambda p: p.relative_to(NBS).as_posix())
def test_notebook(fn, request, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')  # as nbdev-test sets it
    monkeypatch.chdir(fn.parent)
    shell = CaptureShell(fn)
    try:
        for src in sources(fn, request.config.getoption('--slow')):
            shell.run(src)
            if shell.exc is not None: raise shell.exc
    finally:
        shell.close()
        import matplotlib.pyplot as plt
        plt.close('all')


def test_there_are_notebooks():
    assert notebooks(), f'no notebook in {NBS}'
