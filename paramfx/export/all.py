"Everything of one wing, the way out: ordinary networks and recipes: `from paramfx.export.all import *`"
from .materialize import *
