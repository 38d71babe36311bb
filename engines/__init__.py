"""Weights → callables: the bundle format, model families, export, and one file per runtime.

Importing this package (or anything in it but ``export`` and ``families``) needs neither torch nor diffusers.
"""
