"""The wheel: `lkcache` alone at the top, with the code of a project inside, as `lkcache/_project`.

An editable install copies nothing: there the repository is the project.
"""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # a build backend does not look here by itself

from lkcache.project import SHIPPED  # noqa: E402


class WithProject(build_py):
    """Copies what `lkcache init` lays out beside the package's own modules."""

    def run(self) -> None:
        """Build as always, then copy."""
        super().run()
        if self.editable_mode:
            return
        home = Path(self.build_lib) / "lkcache" / "_project"
        shutil.rmtree(home, ignore_errors=True)
        for name in SHIPPED:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, home / name, ignore=ignore)
            else:
                shutil.copyfile(ROOT / name, home / name)


setup(cmdclass={"build_py": WithProject})
