"""taut: efficient parts for any Hugging Face transformer, and an honest account of what each part costs.

``import taut`` is light (no torch) and still makes ``AutoModel.from_pretrained`` open compressed folders. The public
names are listed in ``__init__.pyi``; each is imported when it is first used.
"""

from typing import Any

import lazy_loader

from taut import _plugin

_import_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return _import_public(name)
    if name == "__version__":
        # Reading the metadata of packages takes longer than everything else here.
        from importlib.metadata import version

        return version("taut")
    from taut.core.errors import nearest

    raise AttributeError(f"module 'taut' has no attribute {name!r}: {nearest(name, __all__)}")


_plugin.arm()
