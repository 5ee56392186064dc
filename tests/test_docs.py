"""What the documentation says can be found."""

import re
from pathlib import Path


ROOT = Path(__file__).parent.parent


def test_every_test_that_is_named_exists():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (ROOT / "docs" / "features.md").read_text())
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()]
    assert named and not missing


def test_every_file_of_the_library_is_named_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    files = {path.name for path in (ROOT / "modeling_hope").glob("*.py")} - {"__init__.py"}
    assert not {file for file in files if f"`{file}`" not in readme}
