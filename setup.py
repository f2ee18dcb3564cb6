"""Copies what the study needs at run time into the wheel: params, settings, Snakefile and run notebooks, as tulu_study/_share.

Everything else about the package stands in pyproject.toml. In a checkout (also an editable one) nothing is copied: the files are used where they are."""
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHARED = ("settings.ini", "Snakefile", "params", "nbs/runs")


class BuildWithShare(build_py):
    "Add the shared files after the modules."

    def run(self):
        super().run()
        if self.editable_mode: return
        share = Path(self.build_lib)/"tulu_study"/"_share"
        for name in SHARED:
            source, target = Path(name), share/name
            if not source.exists(): raise FileNotFoundError(f"{name} is missing beside setup.py: the wheel would not find its params.")
            if source.is_dir(): shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "__pycache__"))
            else: target.parent.mkdir(parents=True, exist_ok=True); shutil.copy2(source, target)


setup(cmdclass={"build_py": BuildWithShare})
