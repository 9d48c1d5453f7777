"""Files of the repository that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DEFAULTS = ROOT / "config" / "config.yaml"
DEMO = ROOT / "resources" / "demo"
DETECTOR = DEMO / "detector" / "detector.safetensors"
GOLDEN = ROOT / "tests" / "golden"
