from setuptools import setup

setup(cffi_modules=["kvmigrate/_build.py:ffibuilder"])
