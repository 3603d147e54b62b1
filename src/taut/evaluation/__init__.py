"""Measures what a model can do: the tasks, the code they share, and how much of its context a model uses."""
