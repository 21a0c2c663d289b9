"""Installs efficient_lm; all metadata is in pyproject.toml."""

from setuptools import setup

setup()
