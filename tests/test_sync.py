"The library is what the notebooks export, and the notebooks are clean."
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sysconfig.get_path('scripts'))
KEEP = '__init__.py', 'all.py'  # written by hand; nbdev-export makes the rest


def run(cmd, cwd):
    # nbdev writes no index when IN_TEST is set
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    res = subprocess.run([str(SCRIPTS/cmd)], cwd=cwd, env=env, capture_output=True, text=True)
    assert res.returncode == 0, f'{cmd} failed:\n{res.stdout}\n{res.stderr}'


def texts(folder, pattern):
    return {p.relative_to(folder).as_posix(): p.read_text(encoding='utf8') for p in sorted(folder.rglob(pattern))
            if not any(o[0] == '.' or o == '__pycache__' for o in p.relative_to(folder).parts)}


@pytest.fixture
def copy(tmp_path):
    ignore = shutil.ignore_patterns('.*', '__pycache__', 'models')
    for name in ('nbs', 'paramfx'): shutil.copytree(ROOT/name, tmp_path/name, ignore=ignore)
    shutil.copy(ROOT/'pyproject.toml', tmp_path)
    return tmp_path


def assert_same(new, old, remedy):
    assert sorted(new) == sorted(old), f'files differ: {sorted(set(new) ^ set(old))}; {remedy}'
    changed = [k for k in new if new[k] != old[k]]
    assert not changed, f'{changed} differ; {remedy}'


def test_export_changes_nothing(copy):
    # deleted first, because export leaves the module of a deleted notebook behind
    for p in (copy/'paramfx').rglob('*.py'):
        if p.name not in KEEP or 'zoo' in p.parts: p.unlink()
    run('nbdev-export', copy)
    remedy = 'run nbdev-export, and delete modules whose notebook is gone'
    assert_same(texts(copy/'paramfx', '*.py'), texts(ROOT/'paramfx', '*.py'), remedy)
    assert (copy/'pyproject.toml').read_text() == (ROOT/'pyproject.toml').read_text()


def test_clean_changes_nothing(copy):
    run('nbdev-clean', copy)
    assert_same(texts(copy/'nbs', '*.ipynb'), texts(ROOT/'nbs', '*.ipynb'), 'run nbdev-clean')
