"Everything of one wing, shared filter bases: `from paramfx.bases.all import *`"
from ..core.all import *
from ..report.all import *
from ..export.all import *
from .ortho import *
from .layers import *
from .plan import *
from .init import *
from .callback import *
from .share import *
from .join import *
from .published import *
from .plots import *
from .demo import *
