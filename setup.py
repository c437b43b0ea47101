import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf8')
cfg = ini['DEFAULT']

setup(version=re.search(r'^__version__ = "(.+)"$', (here/'paramfx/__init__.py').read_text(encoding='utf8'), re.M)[1],
      install_requires=cfg['requirements'].split(),
      extras_require={k: cfg[f'{k}_requirements'].split() for k in ('dev', 'dist', 'export', 'heavy')},
      # the nbdev entry point lets other projects' docs link to ours; it lives here because
      # a static [project.entry-points] table would silently drop the console scripts
      entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['paramfx=paramfx._modidx:d']})
