"Everything of one wing, SplitNet: `from paramfx.splitnet.all import *`"
from ..core.all import *
from ..report.all import *
from ..export.all import *
from .terms import *
from .gradients import *
from .plan import *
from .groups import *
from .split import *
from .branches import *
from .workers import *
from .callback import *
from .plots import *
from .tree import *
from .demo import *
