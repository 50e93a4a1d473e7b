"""The kernel benchmark, for whoever has a GPU: ``pydist bench kernels``.

Needs torch and the ``bench`` extra; nothing else of the package imports it.
"""
