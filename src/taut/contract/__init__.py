"""The contract that every method must keep, checked on tiny random models of every family.

The project's tests use it, and so can authors of other methods: ``taut check METHOD``.
"""
