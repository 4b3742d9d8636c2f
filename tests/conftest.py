"""Helper modules in `tests/` (such as `golden_cases`) are importable from every test, at any depth."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
