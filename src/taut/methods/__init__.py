"""The methods: one file each, in the folder of its kind. The folder is the list.

The package can be called: ``taut.methods()`` lists the methods, see ``taut.api.models.methods``.
"""

import sys
from types import ModuleType
from typing import Any

from taut.core.registry import list_methods


class _Methods(ModuleType):
    """Importing a method makes ``taut.methods`` this package, so the package must answer as the function does."""

    def __call__(self, kind: str | None = None) -> list[dict[str, Any]]:
        return list_methods(kind)


sys.modules[__name__].__class__ = _Methods
