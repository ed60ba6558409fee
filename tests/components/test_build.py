import shutil
import subprocess
import sys
from pathlib import Path

import components
from components.runtime.build import build


def test_the_build_is_named_by_what_decides_a_result(tmp_path: Path) -> None:
    shutil.copytree(Path(components.__file__).parent, tmp_path / "components")

    def name() -> str:
        command = [sys.executable, "-c", "from components.runtime.build import build; print(build())"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    assert name() == build()
    with (tmp_path / "components" / "playground" / "chat" / "page.py").open("a") as page:
        page.write("# another colour\n")
    assert name() == build()
    with (tmp_path / "components" / "engine" / "loss.py").open("a") as loss:
        loss.write("# another loss\n")
    assert name() != build()
