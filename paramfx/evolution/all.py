"Everything of one wing, knowledge evolution: `from paramfx.evolution.all import *`"
from ..core.all import *
from ..report.all import *
from ..export.all import *
from .masks import *
from .policies import *
from .forgetting import *
from .generations import *
from .evolve import *
from .callback import *
from .plots import *
from .demo import *
