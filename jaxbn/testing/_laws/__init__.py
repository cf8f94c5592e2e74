"""The laws of batch norm by subject; each law is a function that raises AssertionError if it is broken.

A new law is also listed in ``LAWS`` of ``jaxbn/testing/_report.py``.
"""
