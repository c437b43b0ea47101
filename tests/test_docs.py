"""The docs site without Quarto: what nbdev hands to Quarto is made in a copy, and read.

Making it runs the imports, exports and `show_doc` of every notebook, so a page that cannot be built fails here."""
import ast
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path, PurePosixPath
from posixpath import normpath

import pytest
import yaml

from fresh import run_fresh

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r'\]\(\s*<?([^)\s>]+)|href="([^"]+)"')
FENCE = re.compile(r'^( *)(`{3,}|~{3,}).*?^\1\2[ \t]*$', re.M | re.S)
HEADING = re.compile(r'^#{1,6}[ \t]+(.+?)[ \t]*#*$', re.M)


def slug(title):
    "Anchor of a heading, as Quarto makes it"
    explicit = re.search(r'\{#([^\s}]+)[^}]*\}\s*$', title)
    if explicit: return explicit[1]
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', re.sub(r'\{[^}]*\}\s*$', '', title)).strip().lower()
    return re.sub(r'\s', '-', re.sub(r'[^\w\s.-]', '', text)).lstrip('0123456789.-')


def joined(o): return o if isinstance(o, str) else ''.join(o)


class Page:
    "One processed notebook: front matter, prose, markdown outputs"
    def __init__(self, fn, root):
        self.name = fn.relative_to(root).as_posix()
        self.cells = json.loads(fn.read_text(encoding='utf8'))['cells']
        raw = next((joined(c['source']) for c in self.cells if c['cell_type'] == 'raw'), '')
        self.meta = yaml.safe_load(raw.strip().strip('-')) or {}
        self.html = (PurePosixPath(self.name).parent/self.meta.get('output-file', '?')).as_posix()
        self.outputs = [o for c in self.cells for o in c.get('outputs') or []]
        self.prose = [FENCE.sub('', joined(c['source'])) for c in self.cells if c['cell_type'] == 'markdown']
        shown = [joined(o['data']['text/markdown']) for o in self.outputs if 'text/markdown' in o.get('data', {})]
        self.shown = [FENCE.sub('', s) for s in shown]
        self.shown_anchors = {slug(h) for s in self.shown for h in HEADING.findall(s)}
        self.anchors = self.shown_anchors | {slug(h) for s in self.prose for h in HEADING.findall(s)}

    def links(self):
        for text in self.prose + self.shown:
            for m in LINK.finditer(re.sub(r'`[^`\n]*`', '', text)): yield m[1] or m[2]


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    copy = tmp_path_factory.mktemp('docs')
    ignore = shutil.ignore_patterns('.*', '__pycache__', 'models')
    for name in ('nbs', 'paramfx'): shutil.copytree(ROOT/name, copy/name, ignore=ignore)
    shutil.copy(ROOT/'pyproject.toml', copy)
    env = dict(os.environ, MPLBACKEND='Agg', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    env.pop('IN_TEST', None)
    # nbdev-docs and nbdev-proc-nbs would try to install Quarto; the settings are read once and not for each cell
    cmd = ('import nbdev.config as c, functools; c._load_toml = functools.cache(c._load_toml); '
           'from nbdev.serve import proc_nbs; proc_nbs(force=True, n_workers=0)')
    res = run_fresh(cmd, cwd=copy, env=env)
    assert res.returncode == 0, f'the docs cannot be made:\n{res.stdout[-3000:]}\n{res.stderr[-3000:]}'
    proc = copy/'_proc'
    made = [Page(fn, proc) for fn in sorted(proc.rglob('*.ipynb'))]
    assert {p.name for p in made} == sources(), 'some notebooks have no page'
    return made


def sources():
    nbs = ROOT/'nbs'
    rel = (p.relative_to(nbs) for p in nbs.rglob('*.ipynb'))
    return {p.as_posix() for p in rel if not any(o[0] in '._' for o in p.parts)}


@pytest.fixture(scope='module')
def modidx():
    scope = {}
    exec((ROOT/'paramfx/_modidx.py').read_text(encoding='utf8'), scope)
    return scope['d']


def test_title_and_description(pages):
    for p in pages:
        title = p.meta.get('title')
        assert title and title[0] != '#', f'{p.name} has no good title ({title!r}): start it with a cell `# Title`'
        assert p.meta.get('description'), f'{p.name} has no description: add `> ...` under the title'
    twice = [k for k, n in Counter(p.html for p in pages).items() if n > 1]
    assert not twice, f'several notebooks make {twice}'


def test_outputs(pages):
    for p in pages:
        for o in p.outputs:
            assert o['output_type'] != 'error', f"{p.name}: {o.get('ename')}: {o.get('evalue')}"
            # what source links look like when nbdev cannot find the line
            assert 'LNone' not in json.dumps(o), f'{p.name}: a source link without a line'


def test_no_directive_in_prose(pages):
    for p in pages:
        bad = [line for text in p.prose for line in text.splitlines() if re.match(r'\s*#\s*\|', line)]
        assert not bad, f'{p.name}: {bad} would show on the page'


def in_class_body(mod):
    "Qualified names of methods written inside a class: their page is the class"
    tree = ast.parse((ROOT/(mod.replace('.', '/') + '.py')).read_text(encoding='utf8'))
    return {f'{c.name}.{f.name}' for c in ast.walk(tree) if isinstance(c, ast.ClassDef)
            for f in c.body if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))}


def public_names():
    "Names in an `__all__`: what modules share among themselves (`exporti`) has no heading, and a link to it leads to its page"
    for path in (ROOT/'paramfx').rglob('*.py'):
        for n in ast.parse(path.read_text(encoding='utf8')).body:
            if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__': yield from ast.literal_eval(n.value)


def test_every_name_has_its_heading(pages, modidx):
    by_html, missing, public = {p.html: p for p in pages}, [], set(public_names())
    for mod, syms in modidx['syms'].items():
        inner = in_class_body(mod)
        for full, (link, _) in syms.items():
            name = full[len(mod)+1:]
            if any(part.startswith('_') for part in name.split('.')) or name in inner or name.split('.')[0] not in public: continue
            html, anchor = link.split('#')
            if html not in by_html or anchor not in by_html[html].shown_anchors: missing.append(full)
    assert not missing, f'no documentation shown for {missing}'


def test_links(pages, modidx):
    base = modidx['settings']['doc_host'] + modidx['settings']['doc_baseurl']
    known = {link for syms in modidx['syms'].values() for link, _ in syms.values()}
    by_name, by_html, dead = {p.name: p for p in pages}, {p.html: p for p in pages}, []
    for p in pages:
        for link in p.links():
            path, _, anchor = link.partition('#')
            if link.startswith(base):
                html = path[len(base):].strip('/').removesuffix('.md') or 'index.html'
                target = by_html.get(html)
                if f'{html}#{anchor}' in known: anchor = ''
            elif re.match(r'[a-z][a-z0-9+.-]*:', link): continue
            elif not path: target = p
            else:
                rel = normpath((PurePosixPath(p.name).parent/path).as_posix())
                target = by_name.get(rel) or by_html.get(rel)
                if target is None and (ROOT/'nbs'/rel).is_file() and not rel.endswith('.ipynb'): continue
            if target is None or anchor and anchor not in target.anchors: dead.append((p.name, link))
    assert not dead, f'dead links: {dead}'


def entries(contents):
    for o in contents:
        if isinstance(o, str): yield o
        else:
            for key in ('href', 'file'):
                if key in o: yield o[key]
            yield from entries(o.get('contents', []))


def test_sidebar_lists_every_notebook_once():
    cfg = yaml.safe_load((ROOT/'nbs/_quarto.yml').read_text(encoding='utf8'))
    listed = Counter(entries(cfg['website']['sidebar']['contents']))
    assert not [k for k, n in listed.items() if n > 1], 'listed twice'
    assert set(listed) == sources(), f'sidebar and notebooks differ: {sorted(set(listed) ^ sources())}'


def test_nbdev_yml_is_current():
    "The site's generated settings follow pyproject.toml"
    from nbdev.config import get_config
    from nbdev.quarto import _nbdev_yml
    cfg = get_config(ROOT)
    text = _nbdev_yml.format(doc_path=cfg.doc_path.name, title=cfg.title, description=cfg.description, branch=cfg.branch,
                             git_url=cfg.git_url, doc_host=cfg.doc_host, doc_baseurl=cfg.doc_baseurl)
    assert (ROOT/'nbs/nbdev.yml').read_text(encoding='utf8') == text, 'run nbdev-prepare'


@pytest.mark.parametrize('title,anchor', [
    ('Thing.twice', 'thing.twice'), ('pick_layers', 'pick_layers'), ('A first run', 'a-first-run'),
    ('`Clock`: where are we?', 'clock-where-are-we'), ('Named {#here}', 'here'), ('1. One', 'one')])
def test_the_slug_itself(title, anchor): assert slug(title) == anchor
