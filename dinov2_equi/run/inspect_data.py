"""What is in a data set: `python -m dinov2_equi.data.inspect` from a clone that was not installed.

python dinov2_equi/run/inspect_data.py /data/photos
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: a clean clone needs the repository root on the path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dinov2_equi.data.inspect import main
from dinov2_equi.run.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
