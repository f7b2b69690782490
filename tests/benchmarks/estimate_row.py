"""One row of a plan in a process of its own: python -m tests.benchmarks.estimate_row REQUEST MANIFEST

Prints the most memory that the process ever held, its measure for tests/benchmarks/estimate.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from pipeline.flow import heap
    from pipeline.flow.stage import Request, run_stage
    from tests.benchmarks.common import MARK, peak_mb

    heap.keep_freed()  # as workers do
    request = Request.read(Path(sys.argv[1]))
    manifest = run_stage(request, lambda event: None)
    Path(sys.argv[2]).write_text(json.dumps(manifest))
    print(MARK + json.dumps({"mb": peak_mb()}), flush=True)


if __name__ == "__main__":
    main()
