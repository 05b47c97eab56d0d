"""Build of the one extension module, `rmr1._C`: plain C++20 and nanobind's own source file.

Everything else about the package stands in pyproject.toml. nanobind is compiled in through its
single-file build, so neither CMake nor a shared nanobind library is needed.
"""

from __future__ import annotations

from glob import glob
from pathlib import Path

import nanobind
from setuptools import Extension, setup

NANOBIND = Path(nanobind.include_dir()).parent

extension = Extension(
    "rmr1._C",
    sources=[*sorted(glob("csrc/*.cpp")), str(NANOBIND / "src" / "nb_combined.cpp")],
    depends=sorted(glob("csrc/*.h")),
    include_dirs=[
        "csrc",
        str(NANOBIND / "include"),
        str(NANOBIND / "ext" / "robin_map" / "include"),
    ],
    # No -march=native: wheels travel; fast paths are chosen at run time.
    extra_compile_args=[
        "-std=c++20",
        "-O3",
        "-fvisibility=hidden",
        "-fno-strict-aliasing",
        "-Wall",
        "-Wno-psabi",  # vectors are passed between inlined functions only
        "-fopenmp",
    ],
    extra_link_args=["-pthread", "-fopenmp"],
    language="c++",
)

setup(
    packages=[
        "rmr1",
        "rmr1.datasets",
        "rmr1.endpoints",
        "rmr1.engine",
        "rmr1.evals",
        "rmr1.kernels",
        "rmr1.reporting",
        "rmr1.serving",
        "rmr1.tasks",
        "rmr1.traces",
        "rmr1.verbs",
    ],
    ext_modules=[extension],
)
