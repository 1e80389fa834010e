"""tests/conftest.py: tests of one clone never run another's code, nor one lesson's tests another lesson's modules."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, load


def test_processes_take_utils_from_this_checkout(tmp_path):
    """A `utils` that is installed elsewhere, from another clone, must not be the one that is tested."""
    (tmp_path / "elsewhere" / "utils").mkdir(parents=True)
    (tmp_path / "elsewhere" / "utils" / "__init__.py").touch()
    installed = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(tmp_path / "elsewhere"))))
    done = subprocess.run([sys.executable, "-c", "import importlib.util as u; print(u.find_spec('utils').origin)"],
                          capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": installed})
    assert Path(done.stdout.strip()) == ROOT / "utils" / "__init__.py", done.stderr


def test_scripts_take_utils_from_this_checkout(launch, tmp_path):
    (tmp_path / "where.py").write_text("import os, utils\nprint(utils.__file__, os.environ['PYTHONPATH'])\n")
    process = launch(tmp_path / "where.py")
    assert process.wait() == 0, process.err
    file, path = process.out.split()
    assert Path(file).is_relative_to(ROOT / "utils") and path.split(os.pathsep)[0] == str(ROOT)


def made_up(folder, text):
    folder.mkdir()
    (folder / "earlier.py").write_text(f"WHO = {text!r}\n")
    (folder / "model.py").write_text("import earlier\nfrom earlier import WHO\n")
    (folder / "train.py").write_text("import model\n")
    return folder


def test_lessons_do_not_see_each_others_modules(tmp_path):
    """Every lesson has modules of the same names; each must get its own, earlier.py too."""
    one, two = made_up(tmp_path / "one", "1"), made_up(tmp_path / "two", "2")
    first, second = load(one, "train"), load(two, "train")
    assert (first.model.WHO, second.model.WHO) == ("1", "2")
    assert first.model.earlier is not second.model.earlier and load(one, "earlier") is first.model.earlier
    assert load(one, "model") is first.model and not {"earlier", "model", "train"} & set(sys.modules)
