"""The build: beside the code the wheel carries what users copy, from `pipelines/` and `examples/`.

Everything else about the package stands in `pyproject.toml`.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("pipelines/*.py", "examples/*.*", "examples/launch/*", "examples/hooks/*")


class BuildWithShipped(build_py):
    """Copies these files into the package, as `shipped/`; an editable installation reads them where they are."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for file in (path for pattern in SHIPPED for path in sorted(Path().glob(pattern)) if path.is_file()):
            target = Path(self.build_lib, "difftuning_control", "shipped", file)
            self.mkpath(str(target.parent))
            self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithShipped})
