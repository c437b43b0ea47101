"The project as a package: requirements, commands, version, wheel, and the limits on modules and notebooks."
import ast
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import paramfx

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p for p in (ROOT/'paramfx').rglob('*.py') if p.name[0] != '_')
NOTEBOOKS = [p for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(ROOT).parts)]
EXTRAS = 'dev', 'dist', 'export', 'heavy'


@pytest.fixture(scope='module')
def ini():
    cp = ConfigParser(delimiters=['='])
    cp.read(ROOT/'settings.ini', encoding='utf8')
    return cp['DEFAULT']


def reqs(text): return {canonicalize_name(r.name): r for r in map(Requirement, text.split())}


def commands(ini): return dict(line.split('=') for line in ini['console_scripts'].split())


# settings

def test_requirements_parse(ini):
    for key in ('requirements', *(f'{e}_requirements' for e in EXTRAS)):
        words = ini[key].split()
        assert words and len(reqs(ini[key])) == len(words), f'{key} is empty or names a package twice'


def test_dev_covers_the_other_extras(ini):
    dev = reqs(ini['dev_requirements'])
    for e in set(EXTRAS)-{'heavy'}:  # tools whose tests skip without them
        assert reqs(ini[f'{e}_requirements']).keys() <= dev.keys(), f'the tests need the extra {e}'


def test_settings_hold_no_fact_twice(ini):
    assert set(ini) == {'requirements', 'console_scripts', *(f'{e}_requirements' for e in EXTRAS)}


def test_commands_point_to_functions(ini):
    for name, target in commands(ini).items():
        mod, func = target.split(':')
        tree = ast.parse((ROOT/(mod.replace('.', '/') + '.py')).read_text(encoding='utf8'))
        assert func in [n.name for n in tree.body if isinstance(n, ast.FunctionDef)], f'{name}: no {func} in {mod}'


# installation

def test_commands_are_installed(ini):
    dist = metadata.distribution('paramfx')
    found = {e.name: e.value for e in dist.entry_points if e.group == 'console_scripts'}
    assert found == commands(ini), "run pip install -e '.[dev]' again"
    scripts = Path(sysconfig.get_path('scripts'))
    for name in found: assert shutil.which(name, path=str(scripts)), f'{name} is not in the scripts folder'


def test_one_version():
    init = (ROOT/'paramfx/__init__.py').read_text(encoding='utf8')
    assert re.findall(r'^__version__ = "(.+)"$', init, re.M) == [paramfx.__version__]
    for name in ('pyproject.toml', 'settings.ini', 'setup.py', 'CITATION.cff', 'nbs/_quarto.yml', 'nbs/nbdev.yml'):
        text = (ROOT/name).read_text(encoding='utf8')
        assert not re.search(rf'(?<![\d.]){re.escape(paramfx.__version__)}(?![\d.])', text), f'{name} repeats the version'
    assert metadata.version('paramfx') == paramfx.__version__, "run pip install -e '.[dev]' again"


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel built, through the sdist, from a copy of the whole project"
    src, out = tmp_path_factory.mktemp('src')/'paramfx', tmp_path_factory.mktemp('dist')
    # tests, benchmarks and notebooks come along, so that the build could pick them up by mistake
    shutil.copytree(ROOT, src, ignore=shutil.ignore_patterns('.*', '__pycache__', 'build', 'dist', '*.egg-info',
                                                            '_proc', '_docs', 'models', 'golden', 'paramfx-demo'))
    res = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', str(out), str(src)],
                         capture_output=True, text=True, cwd=out)
    assert res.returncode == 0, res.stdout[-2000:] + res.stderr[-2000:]
    with zipfile.ZipFile(next(out.glob('*.whl'))) as z: yield z


def test_wheel_holds_paramfx_only(wheel):
    names = wheel.namelist()
    info = f'paramfx-{paramfx.__version__}.dist-info'
    assert {n.split('/')[0] for n in names} == {'paramfx', info}
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT/'paramfx').rglob('*.py')}
    assert {n for n in names if n.endswith('.py')} == expected
    assert f'{info}/licenses/LICENSE' in names


def test_wheel_metadata(wheel, ini):
    info = f'paramfx-{paramfx.__version__}.dist-info'
    cp = ConfigParser(delimiters=['='])
    cp.optionxform = str
    cp.read_string(wheel.read(f'{info}/entry_points.txt').decode())
    assert dict(cp['console_scripts']) == commands(ini)
    assert dict(cp['nbdev']) == {'paramfx': 'paramfx._modidx:d'}
    md = metadata.PathDistribution(zipfile.Path(wheel, f'{info}/')).metadata
    got = [Requirement(r) for r in md.get_all('Requires-Dist')]
    assert {canonicalize_name(r.name) for r in got if not r.marker} == reqs(ini['requirements']).keys()
    assert set(md.get_all('Provides-Extra')) == set(EXTRAS)


# modules

@pytest.mark.parametrize('fn', MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_module(fn):
    text = fn.read_text(encoding='utf8')
    if fn.name == 'cli.py': return  # the command line talks to people
    prints = [n.lineno for n in ast.walk(ast.parse(text))
              if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == 'print']
    assert not prints, f'{fn.name} prints in line {prints}: report through the Recorder or a returned report'


# notebooks

# base64 pictures are left out: any short path may turn up in them by chance
TEXT_MIMES = 'text/', 'application/json', 'image/svg'
MACHINE = re.compile(r'(?<![\w./~-])/(?:home|root|Users|opt|tmp|usr|var|mnt|srv|work|workspace|private)/\w|\b[A-Z]:\\+\w')


def output_texts(nb):
    "Every piece of text stored in the outputs of `nb`"
    join = lambda o: o if isinstance(o, str) else ''.join(o) if isinstance(o, list) else json.dumps(o)
    for cell in nb['cells']:
        for out in cell.get('outputs', []):
            if 'text' in out: yield join(out['text'])
            for mime, data in out.get('data', {}).items():
                if mime.startswith(TEXT_MIMES): yield join(data)
            yield from map(join, out.get('traceback', []))


def machine_paths(text):
    "Parts of `text` that tell where it was made"
    found = [w for w in ('site-packages', str(ROOT), sys.prefix) if w in text]
    return found + MACHINE.findall(text)


@pytest.mark.parametrize('fn', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_notebook_file(fn):
    raw = fn.read_text(encoding='utf8')
    nb = json.loads(raw)
    outputs = sum(len(json.dumps(c.get('outputs', []))) for c in nb['cells'])
    assert len(raw) <= 300_000, f'{fn.name} has {len(raw)/1e3:.0f} KB; the limit is 300'
    assert outputs <= 200_000, f'the outputs of {fn.name} have {outputs/1e3:.0f} KB; the limit is 200'
    found = [p for t in output_texts(nb) for p in machine_paths(t)]
    assert not found, f'{fn.name} stores paths of a machine: {found}; run it again with PYTHONWARNINGS=ignore'
    errors = [o['ename'] for c in nb['cells'] for o in c.get('outputs', []) if o['output_type'] == 'error']
    assert not errors, f'{fn.name} stores errors: {errors}'


@pytest.mark.parametrize('text,bad', [
    ('see /home/me/x', True), ("file '/tmp/ab'", True), ('C:\\Users\\me', True), ('lib/site-packages/x', True),
    ('a/tmp/b', False), ('https://docs.fast.ai/home/x', False), ('n/a 3/4', False), ('paramfx-demo/table.md', False)])
def test_the_path_rule_itself(text, bad): assert bool(machine_paths(text)) == bad
