"""torchvision's import beside a PyTorch build that it was not compiled against."""

import importlib.util
import subprocess
import sys

import pytest


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_torchvision_and_transformers_models_import_after_it():
    result = run(
        "import mmfm.infra.torchvision_ops\n"
        "import torchvision.transforms\n"
        "from transformers import BaseImageProcessor, Dinov2WithRegistersModel\n"
        "print('fine')"
    )
    assert result.stdout.strip() == "fine", result.stderr


def test_timm_imports_after_it():
    """No dependency, but often there, and the first to break."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    result = run("import mmfm.infra.torchvision_ops\nimport timm.layers\nprint('fine')")
    assert result.stdout.strip() == "fine", result.stderr


def test_declares_missing_operators_once_and_leaves_a_whole_torchvision_alone():
    result = run(
        "import sys, types\n"
        "sys.modules['torchvision'] = whole = types.ModuleType('torchvision')\n"
        "import mmfm.infra.torchvision_ops as ops\n"
        "assert ops._declared is None and sys.modules['torchvision'] is whole\n"
        "del sys.modules['torchvision']\n"
        "ops.ensure_importable()\n"
        "declared = ops._declared\n"
        "assert ops.ensure_importable() is False and ops._declared is declared\n"
        "print('fine')"
    )
    assert result.stdout.strip() == "fine", result.stderr


def test_other_import_errors_pass_through():
    result = run(
        "import sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torchvision':\n"
        "            raise RuntimeError('disk on fire')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "import mmfm.infra.torchvision_ops\n"
    )
    assert result.returncode != 0 and "disk on fire" in result.stderr
