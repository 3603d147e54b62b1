"""One function per command, shared by ``taut.X`` and the command line. No logic: other packages do the work.

``taut/__init__.pyi`` lists the public ones.
"""
