"""The public names: the one list of them, for type checkers, editors, and the lazy imports of ``__init__.py``."""

from .api.models import anchor_token as anchor_token
from .api.models import apply as apply
from .api.models import export as export
from .api.models import footprint as footprint
from .api.models import heal as heal
from .api.models import load as load
from .api.models import methods as methods
from .api.models import plan as plan
from .api.models import show as show
from .api.models import tokenizer as tokenizer
from .api.models import train as train
from .api.models import tune as tune
from .api.models import undo as undo
from .api.studies import check as check
from .api.studies import compare as compare
from .api.studies import context as context
from .api.studies import evaluate as evaluate
from .api.studies import measure as measure
from .api.studies import report as report
from .api.text import generate as generate
from .api.text import prefix as prefix
from .api.vectors import index as index
from .api.vectors import search as search
from .api.vectors import vectors as vectors
from .core.errors import TautError as TautError
from .core.recipe import Recipe as Recipe

__version__: str
