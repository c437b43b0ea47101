"Everything of one wing, small data sets in memory, images, photos and text: `from paramfx.data.all import *`"
from .loading import *
from .memory import *
from .images import *
from .photos import *
from .text import *
