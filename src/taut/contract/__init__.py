"""What every method must keep, checked on tiny random models of every family. The gate of the project, and the tool
of an outside author: ``taut check METHOD``."""
