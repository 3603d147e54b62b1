"""Healing: training the parts of a compressed model to give the outputs of the original."""
