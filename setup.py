import runpy

from setuptools import setup

guests = runpy.run_path("kvmigrate/guests/_assemble.py")
setup(cffi_modules=["kvmigrate/_build.py:ffibuilder"], cmdclass={"build_py": guests["BuildPy"]})
